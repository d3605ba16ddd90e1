// softmax(scale * Q K^T) V over a key/value cache, for up to 8 query rows a key/value head.
//
// A block takes one (sequence, key/value head, split of the keys); a second kernel merges the
// splits. A warp is cut into groups of lanes: a group takes a key, and each of its lanes the same
// kElements of head_dim for all keys and all rows, so that keys and values are read once for all
// query heads. What a lane computes with, it has itself copied to shared memory (16-byte
// cp.async, two stages of keys and values): the loop needs no barrier, and 64 KiB of copies a
// block are on their way to cover the latency of memory. Every group keeps a softmax of its own;
// groups, then warps, then splits are merged by their maxima and sums.
#pragma once

#include "device.cuh"

namespace aigc_fast {

struct DecodeAttention {
  const void *query, *keys, *values, *lengths;
  void* out;         // (batch, q_len, heads, head_dim), of the type of query
  float* lse;        // (batch, q_len, heads)
  float* parts;      // (batch, q_len, heads, splits, head_dim), if splits > 1
  float* parts_lse;  // (batch, q_len, heads, splits)
  int64_t query_batch, query_seq, query_head, query_dim;  // strides in elements
  int64_t key_batch, key_seq, key_head, value_batch, value_seq, value_head, lengths_stride;
  int64_t batch;
  int q_len, heads, kv_heads, head_dim, capacity, splits;
  bool lengths_are_long;
  float scale;
};

constexpr int kWarps = 4, kStages = 2, kMaxRows = 8, kMaxHeadDim = 256, kMaxSplits = 64;

// ROWS: query rows of a key/value head, rounded up to 1, 4 or 8; DIM: head_dim, to a power of two.
template <class T, int DIM, int ROWS>
struct DecodeShape {
  static constexpr int kElements = ROWS <= 4 ? 16 : 8;      // of head_dim, a lane; x ROWS registers
  static constexpr int kPieces = kElements / kPiece<T>;     // 16-byte pieces of a key, a lane
  static constexpr int kLanes = DIM / kElements;            // lanes of a group
  static constexpr int kGroups = 32 / kLanes;               // keys at once, a warp
  static constexpr int kBatch = kPieces <= 2 ? 4 : 2;       // keys a group scores together
  static constexpr int kKeys = kWarps * kBatch * kGroups;   // keys of a stage, a block
  static constexpr int kStage = 2 * kBatch * kPieces * 32;  // pieces, a warp
  static constexpr int kShared = kWarps * kStages * kStage * 16;  // bytes
  static_assert(ROWS * DIM * 4 <= kStages * kStage * 16, "a warp's result fits in its stages");
  static_assert(kLanes >= 4 && kLanes <= 32);
};

// ---- the running softmax -------------------------------------------------------------------

// exp2(x - top), where a maximum of -inf stands for no key at all. fmaxf drops a NaN, but its
// weight is NaN, and so is the sum.
__device__ inline float weight_of(float x, float top) {
  return exp2f(x - (top == -INFINITY ? 0.0f : top));
}

__device__ inline int64_t length_of(const DecodeAttention& p, int64_t b) {
  const int64_t at = b * p.lengths_stride;
  const int64_t length = p.lengths_are_long ? static_cast<const int64_t*>(p.lengths)[at]
                                            : static_cast<const int32_t*>(p.lengths)[at];
  return length < 0 ? 0 : length > p.capacity ? p.capacity : length;
}

// Starts copying the keys and values of `step` into a stage; keys from `end` on become zeros.
template <class T, int DIM, int ROWS>
__device__ inline void copy_stage(const DecodeAttention& p, const T* keys, const T* values,
                                  int first, int end, uint4* stage) {
  using S = DecodeShape<T, DIM, ROWS>;
  const int lane = threadIdx.x % 32, group = lane / S::kLanes, slice = lane % S::kLanes;
#pragma unroll
  for (int j = 0; j < S::kBatch; ++j) {
    const int key = first + j * S::kGroups + group;
#pragma unroll
    for (int c = 0; c < S::kPieces; ++c) {
      const int dim = (c * S::kLanes + slice) * kPiece<T>;
      const bool valid = key < end && dim < p.head_dim;
      const int64_t k = valid ? key * p.key_seq + dim : 0;
      const int64_t v = valid ? key * p.value_seq + dim : 0;
      uint4* to = stage + (j * S::kPieces + c) * 32 + lane;
      copy_async(to, keys + k, valid);
      copy_async(to + S::kStage / 2, values + v, valid);
    }
  }
}

template <class T, int DIM, int ROWS>
__device__ inline void load_piece(const uint4* piece, float* out) {
  using S = DecodeShape<T, DIM, ROWS>;
#pragma unroll
  for (int c = 0; c < S::kPieces; ++c)
    unpack(piece[c * 32], out + c * kPiece<T>, static_cast<const T*>(nullptr));
}

// A lane's part of the results of ROWS rows.
template <int ROWS, int ELEMENTS>
struct RunningResult {
  float top[ROWS], sum[ROWS], value[ROWS][ELEMENTS];

  // Takes in the same row's result over other keys.
  __device__ void merge(int r, float other_top, float other_sum, int lane_mask) {
    const float both = fmaxf(top[r], other_top);
    const float mine = weight_of(top[r], both), other = weight_of(other_top, both);
    top[r] = both;
    sum[r] = sum[r] * mine + other_sum * other;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e)
      value[r][e] = value[r][e] * mine + __shfl_xor_sync(kAllLanes, value[r][e], lane_mask) * other;
  }
};

// One stage of keys and values for all rows.
template <class T, int DIM, int ROWS, class Result>
__device__ inline void add_stage(const uint4* stage, const float (&query)[ROWS][16], int first,
                                 const int (&limit)[ROWS], Result& result) {
  using S = DecodeShape<T, DIM, ROWS>;
  const int lane = threadIdx.x % 32, group = lane / S::kLanes;
  float scores[S::kBatch][ROWS], top[ROWS];
#pragma unroll
  for (int j = 0; j < S::kBatch; ++j) {
    float key[S::kElements];
    load_piece<T, DIM, ROWS>(stage + j * S::kPieces * 32 + lane, key);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float sum = 0;
#pragma unroll
      for (int e = 0; e < S::kElements; ++e) sum += query[r][e] * key[e];
#pragma unroll
      for (int mask = S::kLanes / 2; mask > 0; mask /= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, mask);
      scores[j][r] = first + j * S::kGroups + group < limit[r] ? sum : -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    top[r] = result.top[r];
#pragma unroll
    for (int j = 0; j < S::kBatch; ++j) top[r] = fmaxf(top[r], scores[j][r]);
    const float decay = weight_of(result.top[r], top[r]);
    result.top[r] = top[r];
    result.sum[r] *= decay;
#pragma unroll
    for (int j = 0; j < S::kBatch; ++j) {
      scores[j][r] = weight_of(scores[j][r], top[r]);
      result.sum[r] += scores[j][r];
    }
#pragma unroll
    for (int e = 0; e < S::kElements; ++e) result.value[r][e] *= decay;
  }
#pragma unroll
  for (int j = 0; j < S::kBatch; ++j) {
    float value[S::kElements];
    load_piece<T, DIM, ROWS>(stage + S::kStage / 2 + j * S::kPieces * 32 + lane, value);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int e = 0; e < S::kElements; ++e) result.value[r][e] += scores[j][r] * value[e];
  }
}

// ---- kernels -----------------------------------------------------------------------------------

template <class T, int DIM, int ROWS>
__global__ void __launch_bounds__(kWarps * 32) attend_kernel(const DecodeAttention p) {
  using S = DecodeShape<T, DIM, ROWS>;
  uint4* const stages = dynamic_shared();
  __shared__ float tops[kWarps][ROWS], sums[kWarps][ROWS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / S::kLanes, slice = lane % S::kLanes;
  const int split = blockIdx.x % p.splits, head = blockIdx.x / p.splits % p.kv_heads;
  const int64_t b = blockIdx.x / p.splits / p.kv_heads;
  const int heads = p.heads / p.kv_heads, rows = heads * p.q_len;

  // Each split as long as this sequence asks, in whole stages.
  const int length = static_cast<int>(length_of(p, b));
  const int per_split = (length + p.splits - 1) / p.splits;
  const int size = (per_split + S::kKeys - 1) / S::kKeys * S::kKeys;
  const int begin = min(static_cast<int64_t>(split) * size, static_cast<int64_t>(length));
  const int end = min(length - begin, size) + begin;
  const int steps = (end - begin + S::kKeys - 1) / S::kKeys;

  const T* keys = static_cast<const T*>(p.keys) + b * p.key_batch + head * p.key_head;
  const T* values = static_cast<const T*>(p.values) + b * p.value_batch + head * p.value_head;
  uint4* my_stages = stages + warp * kStages * S::kStage;
  const int first = begin + warp * S::kBatch * S::kGroups;
  if (steps > 0) copy_stage<T, DIM, ROWS>(p, keys, values, first, end, my_stages);
  commit_copies();

  // The scale is in the query, and the softmax is in powers of two.
  float query[ROWS][16];
  int limit[ROWS];
  RunningResult<ROWS, S::kElements> result;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int i = r / heads;
    const T* from = static_cast<const T*>(p.query) + b * p.query_batch + i * p.query_seq +
                    (head * heads + r % heads) * p.query_head;
    limit[r] = r < rows ? min(length - p.q_len + i + 1, end) : 0;
    result.top[r] = -INFINITY;
    result.sum[r] = 0;
#pragma unroll
    for (int e = 0; e < S::kElements; ++e) {
      const int dim = (e / kPiece<T> * S::kLanes + slice) * kPiece<T> + e % kPiece<T>;
      const bool valid = r < rows && dim < p.head_dim;
      query[r][e] = valid ? to_float(from[dim * p.query_dim]) * (p.scale * 1.44269504f) : 0.0f;
      result.value[r][e] = 0;
    }
  }

  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps)
      copy_stage<T, DIM, ROWS>(p, keys, values, first + (step + 1) * S::kKeys, end,
                               my_stages + (step + 1) % kStages * S::kStage);
    commit_copies();
    wait_copies<1>();
    add_stage<T, DIM, ROWS>(my_stages + step % kStages * S::kStage, query, first + step * S::kKeys,
                            limit, result);
  }
  wait_copies<0>();

  // Groups of the warp.
#pragma unroll
  for (int mask = S::kLanes; mask < 32; mask *= 2)
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      result.merge(r, __shfl_xor_sync(kAllLanes, result.top[r], mask),
                   __shfl_xor_sync(kAllLanes, result.sum[r], mask), mask);

  // Warps of the block. A warp's stages, which all its lanes have read, take its result.
  __syncwarp();
  if (group == 0) {
    float* mine = reinterpret_cast<float*>(my_stages);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (slice == 0) tops[warp][r] = result.top[r];
      if (slice == 0) sums[warp][r] = result.sum[r];
#pragma unroll
      for (int e = 0; e < S::kElements; ++e)
        mine[r * DIM + (e / kPiece<T> * S::kLanes + slice) * kPiece<T> + e % kPiece<T>] =
            result.value[r][e];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < rows * DIM; at += kWarps * 32) {
    const int r = at / DIM, dim = at % DIM;
    float top = tops[0][r], sum = 0, value = 0;
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][r]);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = weight_of(tops[w][r], top);
      sum += weight * sums[w][r];
      value += weight * reinterpret_cast<const float*>(stages + w * kStages * S::kStage)[at];
    }
    const int64_t row = (b * p.q_len + r / heads) * p.heads + head * heads + r % heads;
    const float lse = sum == 0 ? -INFINITY : top * 0.693147181f + logf(sum);
    if (dim == 0) (p.splits == 1 ? p.lse : p.parts_lse)[row * p.splits + split] = lse;
    if (dim >= p.head_dim) continue;
    value = sum == 0 ? 0.0f : value / sum;
    if (p.splits == 1)
      from_float(value, static_cast<T*>(p.out) + row * p.head_dim + dim);
    else
      p.parts[(row * p.splits + split) * p.head_dim + dim] = value;
  }
}

// A warp merges the splits of one row.
template <class T>
__global__ void __launch_bounds__(kWarps * 32) merge_kernel(const DecodeAttention p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.batch * p.q_len * p.heads) return;
  const float* lse = p.parts_lse + row * p.splits;
  float top = -INFINITY, sum = 0, value[kMaxHeadDim / 32] = {};
  for (int i = 0; i < p.splits; ++i) top = fmaxf(top, lse[i]);
  for (int i = 0; i < p.splits; ++i) {
    const float weight = expf(lse[i] - (top == -INFINITY ? 0.0f : top));
    const float* part = p.parts + (row * p.splits + i) * p.head_dim;
    sum += weight;
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; ++j)
      if (lane + 32 * j < p.head_dim) value[j] += weight * part[lane + 32 * j];
  }
  if (lane == 0) p.lse[row] = sum == 0 ? -INFINITY : top + logf(sum);
#pragma unroll
  for (int j = 0; j < kMaxHeadDim / 32; ++j)
    if (lane + 32 * j < p.head_dim)
      from_float(sum == 0 ? 0.0f : value[j] / sum,
                 static_cast<T*>(p.out) + row * p.head_dim + lane + 32 * j);
}

// ---- choice of kernel -----------------------------------------------------------------------

// The fewest splits, of at least 128 keys, that leave few multiprocessors idle in the last round
// of two blocks each.
inline int choose_splits(int64_t blocks, int capacity, int processors) {
  const int64_t slots = 2 * processors, most = (capacity + 127) / 128;
  auto busy = [&](int64_t splits) {  // share of the slots that a block fills, over all rounds
    const int64_t rounds = (blocks * splits + slots - 1) / slots;
    return static_cast<double>(blocks * splits) / (rounds * slots);
  };
  double best = 0;
  for (int64_t i = 1; i <= kMaxSplits && i <= most; ++i) best = busy(i) > best ? busy(i) : best;
  for (int64_t i = 1; i <= kMaxSplits && i <= most; ++i)
    if (busy(i) >= 0.9 * best) return static_cast<int>(i);
  return 1;
}

// launch(kernel, blocks, shared bytes, p) for the kernels that p needs.
template <class T, class Launch>
void launch_decode_attention(const DecodeAttention& p, Launch&& launch) {
  const int rows = p.heads / p.kv_heads * p.q_len;
  auto attend = [&]<int DIM, int ROWS>() {
    launch(attend_kernel<T, DIM, ROWS>, p.batch * p.kv_heads * p.splits,
           DecodeShape<T, DIM, ROWS>::kShared, p);
  };
  auto with_rows = [&]<int DIM>() {
    if (rows == 1) return attend.template operator()<DIM, 1>();
    if (rows <= 4) return attend.template operator()<DIM, 4>();
    attend.template operator()<DIM, 8>();
  };
  if (p.head_dim <= 64)
    with_rows.template operator()<64>();
  else if (p.head_dim <= 128)
    with_rows.template operator()<128>();
  else
    with_rows.template operator()<256>();
  if (p.splits > 1)
    launch(merge_kernel<T>, (p.batch * p.q_len * p.heads + kWarps - 1) / kWarps, 0, p);
}

}  // namespace aigc_fast

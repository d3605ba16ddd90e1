// y = x @ weight.T + bias for up to 8 rows of x and a weight of 4- or 8-bit codes, which lie as
// quantized_format.h has them.
//
// Tensor cores multiply, so that 8 rows of x take the instructions of one, and a row gets the same
// bits among any others. Codes less the middle of their range are exact in bf16, fp16 and int8, and
// so are all products; fp32 x is three bf16 numbers that add up to it. A warp takes 32 rows of the
// weight (two tiles) and a step of up to 32 columns of a group at a time. Each lane multiplies what
// it has itself copied, 16 bytes of codes (4 rows of a run) and 8 columns of a row of x: that is
// how mma.m16n8k16 wants its operands, for some order of rows and columns. Tensor cores cut sums
// off where fp32 would round, so that after each step the sums are scaled and added up in fp32.
//
// A block is 8 warps, which take stages of kSteps steps by turns; their sums are added in the order
// of the warps. While a warp multiplies one stage, the next three (two for fp32 x) are on their way
// by cp.async: of 4-bit weights 27 KB a block. An H200 has room for three blocks a multiprocessor.
#pragma once

#include "quantized_operands.cuh"
#include "quantized_stages.cuh"

namespace aigc_fast {

// result += x * weight of a stage, for this lane's 4 rows of the weight and 2 of x.
template <class X, int BITS>
__device__ inline void add_stage(const QuantizedGemv& p, const uint4* stage, int lane,
                                 float (&result)[4][2]) {
  using S = GemvShape<X, BITS>;
  using O = Operand<X>;
  using Number = typename O::Number;
#pragma unroll
  for (int j = 0; j < S::kSteps; ++j) {
    uint4 raw[S::kXPieces];
#pragma unroll
    for (int c = 0; c < S::kXPieces; ++c)
      raw[c] = stage[S::kXBegin + (j / S::kXSteps * S::kXPieces + c) * 32 + lane];
    uint32_t x[O::kParts][O::kWords];
    O::activations(raw, j % S::kXSteps, x);

    uint32_t words[4][S::kCodes], codes[4][O::kWords];
#pragma unroll
    for (int c = 0; c < S::kCodes; ++c) {
      const uint4 piece = stage[(j * S::kCodes + c) * 32 + lane];
      words[0][c] = piece.x, words[1][c] = piece.y, words[2][c] = piece.z, words[3][c] = piece.w;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) O::codes(words[r], codes[r]);

    typename O::Sum sums[2][4] = {};
#pragma unroll
    for (int part = O::kParts - 1; part >= 0; --part)  // the small ones first
#pragma unroll
      for (int i = 0; i < O::kWords; i += 2)
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const auto &even = codes[2 * pair], &odd = codes[2 * pair + 1];
          const uint32_t a[4] = {even[i], odd[i], even[i + 1], odd[i + 1]};
          add_product(sums[pair], a, x[part] + i, Number{});
        }

    // The scales of this lane's 4 rows, and of x in the two rows that its sums are of.
    const uint2* halves =
        reinterpret_cast<const uint2*>(stage + S::kScales + j * 8) + lane / 16 * 8 + lane / 4 % 4;
    float by[2] = {1, 1}, scale[4];
    unpack_halves(halves[0], scale);
    if constexpr (S::kIntegers) {
      const float2 pair = reinterpret_cast<const float2*>(stage + S::kXScales + j * 2)[lane % 4];
      by[0] = pair.x, by[1] = pair.y;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float sum = static_cast<float>(sums[r / 2][r % 2 * 2 + n]);
        result[r][n] += sum * (S::kIntegers ? by[n] * O::template kUnit<BITS> : 1) * scale[r];
      }

    if (p.has_minimum) {  // times the sum of x, which is a product with ones
      typename O::Sum totals[4] = {};
      const uint32_t ones[4] = {O::kOnes, O::kOnes, O::kOnes, O::kOnes};
#pragma unroll
      for (int part = O::kParts - 1; part >= 0; --part)
#pragma unroll
        for (int i = 0; i < O::kWords; i += 2) add_product(totals, ones, x[part] + i, Number{});
      float minimum[4];
      unpack_halves(halves[4], minimum);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n)
          result[r][n] +=
              (minimum[r] + scale[r] * (1 << (BITS - 1))) * (static_cast<float>(totals[n]) * by[n]);
    }
  }
}

template <class X, int BITS>
__global__ void __launch_bounds__(kGemvWarps * 32, 2) gemv_kernel(const QuantizedGemv p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  using S = GemvShape<X, BITS>;
  uint4* const stages = dynamic_shared() + warp * S::kStages * S::kStage;
  GemvCopies<X, BITS> copies(p, warp, lane);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    copies.next(stages + i * S::kStage);
    commit_copies();
  }
  float result[4][2] = {};
  const int count = (p.groups * p.group_steps - 1) / S::kSteps + 1;
  for (int i = warp, at = 0; i < count; i += kGemvWarps) {
    wait_copies<S::kStages - 2>();
    __syncwarp();  // other lanes have copied scales, and are done with the stage before
    copies.next(stages + (at == 0 ? S::kStages - 1 : at - 1) * S::kStage);
    commit_copies();
    add_stage<X, BITS>(p, stages + at * S::kStage, lane, result);
    at = at == S::kStages - 1 ? 0 : at + 1;
  }
  wait_copies<0>();
  __syncwarp();

  // A warp's stages take its sums, (8, 32) of x's and the weight's rows.
  constexpr int kRows = kGemvTiles * 16;  // of the weight
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      reinterpret_cast<float*>(stages)[(lane % 4 * 2 + n) * kRows + lane / 4 * 4 + r] =
          result[r][n];
  __syncthreads();
  for (int at = threadIdx.x; at < p.rows * kRows; at += kGemvWarps * 32) {
    const int column = blockIdx.x * kRows + at % kRows;
    if (column >= p.out_features) break;
    float sum = 0;
    for (int w = 0; w < kGemvWarps; ++w)
      sum += reinterpret_cast<const float*>(dynamic_shared() + w * S::kStages * S::kStage)[at];
    const int64_t to = int64_t{at / kRows} * p.out_features + column;
    auto finish = [&]<class T>(const T* bias, T* out) {
      from_float(bias ? sum + to_float(bias[column]) : sum, out + to);
    };
    if (p.type == Element::kFloat)
      finish(static_cast<const float*>(p.bias), static_cast<float*>(p.out));
    else if (p.type == Element::kBFloat16)
      finish(static_cast<const cuda_bf16*>(p.bias), static_cast<cuda_bf16*>(p.out));
    else
      finish(static_cast<const cuda_fp16*>(p.bias), static_cast<cuda_fp16*>(p.out));
  }
}

// Multiplies p.rows rows of contiguous x, of p.type = T. Calls allocate(bytes) for scratch memory
// and launch(kernel, blocks, threads, shared bytes, arguments).
template <class T, class Allocate, class Launch>
void launch_quantized_linear(QuantizedGemv p, int bits, int in_features, int group_size,
                             bool quantize_activations, Allocate&& allocate, Launch&& launch) {
  auto multiply = [&]<class X>(X) {
    const int blocks = (p.tiles + kGemvTiles - 1) / kGemvTiles, threads = kGemvWarps * 32;
    if (bits == 4)
      launch(gemv_kernel<X, 4>, blocks, threads, GemvShape<X, 4>::kShared, p);
    else
      launch(gemv_kernel<X, 8>, blocks, threads, GemvShape<X, 8>::kShared, p);
  };
  p.group_runs = group_size * bits / 32;
  p.group_steps = (group_size + 31) / 32;
  p.x_row_bytes = in_features * sizeof(T);
  p.x_pieces = p.x_row_bytes / 16;
  const bool in_order =
      group_size % 32 == 0 && p.x_row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  if (in_order && !quantize_activations) return multiply(T{});

  // As int8, two steps lie together.
  const int steps = p.groups * p.group_steps;
  const int width = (quantize_activations ? steps + steps % 2 : steps) * 32;
  p.x_row_bytes = width * (quantize_activations ? 1 : sizeof(T));
  p.x_pieces = p.x_row_bytes / 16;
  ArrangeRows a{};
  a.x = p.x;
  a.out = allocate(p.rows * p.x_row_bytes);
  if (quantize_activations) a.scales = reinterpret_cast<float*>(allocate(p.groups * 32));
  a.x_row = in_features, a.out_row = width;
  a.in_features = in_features, a.groups = p.groups;
  a.group_size = group_size, a.group_steps = p.group_steps;
  a.threads = group_size <= 128 ? 32 : kMaxArrangeThreads;
  p.x = static_cast<const char*>(a.out);
  p.x_scales = a.scales;
  launch(quantize_activations ? arrange_kernel<T, true> : arrange_kernel<T, false>,
         p.rows * p.groups, a.threads, 0, a);
  quantize_activations ? multiply(int8_t{}) : multiply(T{});
}

}  // namespace aigc_fast

// Attention of a few query rows to a few keys: one unit of work of decode_attention.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "tensor.h"
#include "vector_pair.h"

namespace aigc_fast {

constexpr int64_t kBlock = 32;  // keys between two looks at the running maximum
constexpr int64_t kRows = 32;   // most rows of a unit

template <class T>
struct Rows {  // a tensor (batch, seq, head, head_dim) with its last dimension contiguous
  const T* data;
  int64_t batch, seq, head;
  Rows(const T* rows, int64_t batch, int64_t seq, int64_t head)
      : data(rows), batch(batch), seq(seq), head(head) {}
  explicit Rows(const Tensor& x)
      : data(aigc_fast::data<T>(x)), batch(x.stride(0)), seq(x.stride(1)), head(x.stride(2)) {}
};

struct Shape {
  int64_t batch, q_len, heads, kv_heads, head_dim, capacity;
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return q_len * group(); }
  // Keys that query `i` of a sequence sees.
  int64_t visible(int64_t length, int64_t i) const {
    return std::max<int64_t>(0, length - q_len + i + 1);
  }
};

// Row r of a key/value head is query r / group of head r % group, so that the rows of a tile see
// about as many keys.
template <class T, int R>
class Attention {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, K = L / R;  // lanes; keys of a score tile
  static_assert(L % R == 0 && kBlock % K == 0 && kRows % R == 0);

  Attention(const Shape& shape, Rows<T> query, Rows<T> keys, Rows<T> values, A scale)
      : s_(shape),
        query_(query),
        keys_(keys),
        values_(values),
        scale_(scale),
        pairs_((shape.head_dim + 2 * L - 1) / (2 * L)) {}

  // Numbers in a tile of rows: their queries [pair][2][R][L], or their results, which are the
  // weighted values in the same order, and the maximum and the sum of each row, L lanes each.
  int64_t query_size() const { return pairs_ * 2 * R * L; }
  int64_t result_size() const { return query_size() + 2 * L; }

  const T* key(int64_t b, int64_t head, int64_t index) const {
    return keys_.data + b * keys_.batch + head * keys_.head + index * keys_.seq;
  }

  // Results of the rows [first, last) of a head over the keys [begin, end). `after` is where the
  // thread will read next.
  void attend(int64_t b, int64_t head, int64_t first, int64_t last, int64_t length, int64_t begin,
              int64_t end, const T* after, A* query, A* result) const {
    for (int64_t row = first; row < last; row += R) {
      load_query(b, head, row, last, query + (row - first) / R * query_size());
      A* tile = result + (row - first) / R * result_size();
      std::fill_n(tile, result_size(), A(0));
      store(tile + query_size(), broadcast(-std::numeric_limits<A>::infinity()));
    }
    const T* values = values_.data + b * values_.batch + head * values_.head;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t stop = std::min(end, start + kBlock);
      Block block{key(b, head, start),
                  values + start * values_.seq,
                  stop < end ? key(b, head, stop) : after,
                  start,
                  stop,
                  true};
      for (int64_t row = first; row < last; row += R, block.is_new = false) {
        const int64_t tile = (row - first) / R;
        add_block(block, row, std::min(last, row + R), length, query + tile * query_size(),
                  result + tile * result_size());
      }
    }
  }

  // Merges `count` results of a tile, `stride` apart, and writes the rows [row, last).
  void merge(const A* results, int64_t count, int64_t stride, int64_t b, int64_t head, int64_t row,
             int64_t last, T* out, A* lse) const {
    const A* maxima = results + query_size();
    V top = load(maxima);
    for (int64_t i = 1; i < count; ++i) top = max<A>(top, load(maxima + i * stride));
    const V base = finite_or_zero(top);
    std::vector<A> weights(count * L);
    V sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const V weight = exp_of_negative<A>(load(maxima + i * stride) - base);
      sum += weight * load(maxima + i * stride + L);
      store(weights.data() + i * L, weight);
    }
    A tops[L], sums[L];
    store(tops, top);
    store(sums, sum);
    for (int64_t r = row; r < last; ++r) {
      const int64_t lane = r - row;
      const int64_t at =
          (b * s_.q_len + r / s_.group()) * s_.heads + head * s_.group() + r % s_.group();
      const A norm = sums[lane] == 0 ? A(0) : 1 / sums[lane];
      lse[at] = tops[lane] + std::log(sums[lane]);
      for (int64_t p = 0; p < pairs_; ++p) {
        V even = {}, odd = {};
        for (int64_t i = 0; i < count; ++i) {
          const A* value = results + i * stride + (p * 2 * R + lane) * L;
          even += load(value) * weights[i * L + lane];
          odd += load(value + R * L) * weights[i * L + lane];
        }
        store_pair(out + at * s_.head_dim + p * 2 * L, even * norm, odd * norm,
                   std::min<int64_t>(2 * L, s_.head_dim - p * 2 * L));
      }
    }
  }

 private:
  struct Block {
    const T *keys, *values, *next;  // next: the keys to read after this block
    int64_t start, stop;
    bool is_new;  // not yet in the cache
  };

  static V finite_or_zero(V v) { return v == -std::numeric_limits<A>::infinity() ? V{} : v; }

  void load_query(int64_t b, int64_t head, int64_t row, int64_t last, A* tile) const {
    for (int r = 0; r < R; ++r) {
      const int64_t i = (row + r) / s_.group(), g = (row + r) % s_.group();
      for (int64_t p = 0; p < pairs_; ++p) {
        V x = {}, y = {};
        if (row + r < last)
          load_pair(query_.data + b * query_.batch + i * query_.seq +
                        (head * s_.group() + g) * query_.head + p * 2 * L,
                    std::min<int64_t>(2 * L, s_.head_dim - p * 2 * L), x, y);
        store(tile + (p * 2 * R + r) * L, x);
        store(tile + (p * 2 * R + R + r) * L, y);
      }
    }
  }

  // One block of keys for one tile of rows.
  void add_block(const Block& block, int64_t row, int64_t last, int64_t length, const A* query,
                 A* result) const {
    const int64_t fewest = s_.visible(length, row / s_.group());
    const int64_t most = s_.visible(length, (last - 1) / s_.group());
    const int64_t count = std::min(most, block.stop) - block.start;
    if (count <= 0) return;

    alignas(64) A scores[kBlock * R];
    const V lowest = broadcast(-std::numeric_limits<A>::infinity());
    V top = lowest;
    for (int64_t k = 0; k < count; k += K) {
      if (block.is_new)
        for (int i = 0; i < K; ++i) prefetch(block.values + (k + i) * values_.seq);
      const V score = dot_products(query, block.keys + k * keys_.seq, count - k) * scale_;
      store(scores + k * R, score);
      top = max<A>(top, score);
    }
    // Where rows see different numbers of keys, or a tile has no key left.
    if (const int64_t padded = (count + K - 1) / K * K; block.start + padded > fewest) {
      top = lowest;
      for (int64_t k = 0; k < padded; k += K) {
        for (int lane = 0; lane < L; ++lane) {
          const int64_t seen = s_.visible(length, std::min(row + lane % R, last - 1) / s_.group());
          if (block.start + k + lane / R >= seen) scores[k * R + lane] = lowest[0];
        }
        top = max<A>(top, load(scores + k * R));
      }
    }
    top = over_keys<A, R>(top, max<A>);
    const V before = load(result + query_size());
    const V now = max<A>(before, top), base = finite_or_zero(now);
    const V decay = exp_of_negative<A>(before - base);
    V sum = {};
    for (int64_t k = 0; k < count; k += K) {
      const V p = exp_of_negative<A>(load(scores + k * R) - base);
      store(scores + k * R, p);
      sum += p;
    }
    sum = over_keys<A, R>(sum, [](V a, V b) { return a + b; });
    store(result + query_size(), now);
    store(result + query_size() + L, load(result + query_size() + L) * decay + sum);
    A decays[L];
    store(decays, decay);

    add_all_values<kPairs>(scores, block, count, 0, decays, result);
  }

  // Always inlined: GCC 12 drops calls of a function that does nothing else.
  AIGC_INLINE void prefetch(const T* row) const {
    const char* p = reinterpret_cast<const char*>(row);
    for (size_t i = 0; i < s_.head_dim * sizeof(T); i += 64) __builtin_prefetch(p + i, 0, 3);
  }

  // The products of K keys with the R queries of a tile: lane k * R + r. Keys past `count` are
  // replaced by the last one; their scores are masked.
  V dot_products(const A* query, const T* keys, int64_t count) const {
    const T* key[K];
    key[0] = keys;
    for (int k = 1; k < K; ++k) key[k] = key[k - 1] + (k < count ? keys_.seq : 0);
    V sums[L] = {};
    auto add = [&](const A* q, auto load) {
      V even[K], odd[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) load(key[k], even[k], odd[k]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V a = aigc_fast::load(q + r * L), b = aigc_fast::load(q + (R + r) * L);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          sums[k * R + r] += a * even[k];
          sums[k * R + r] += b * odd[k];
        }
      }
    };
    const int64_t whole = s_.head_dim / (2 * L) * (2 * L), rest = s_.head_dim - whole;
    for (int64_t d = 0; d < whole; d += 2 * L)
      add(query + d * R, [d](const T* p, V& a, V& b) { load_pair(p + d, a, b); });
    if (rest)
      add(query + whole * R, [=](const T* p, V& a, V& b) { load_pair(p + whole, rest, a, b); });
    return sum_each<A>(sums);
  }

  // All pairs of head_dim from `pair`, as many at a time as registers allow.
  template <int P>
  void add_all_values(const A* probabilities, const Block& block, int64_t count, int64_t pair,
                      const A* decays, A* result) const {
    const int64_t whole = s_.head_dim / (2 * L), rest = s_.head_dim % (2 * L);
    for (; pair + P <= whole; pair += P)
      add_values<P>(probabilities, block, count, pair, 0, decays, result);
    if constexpr (P > 1)
      add_all_values<P / 2>(probabilities, block, count, pair, decays, result);
    else if (rest)
      add_values<1>(probabilities, block, count, pair, rest, decays, result);
  }

  // Adds probabilities * values for P pairs of head_dim; `rest` elements of the last pair if not 0.
  template <int P>
  void add_values(const A* probabilities, const Block& block, int64_t count, int64_t pair,
                  int64_t rest, const A* decays, A* result) const {
    V sums[2 * P][R];
    A* out = result + pair * 2 * R * L;
#pragma GCC unroll 16
    for (int j = 0; j < 2 * P; ++j)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[j][r] = load(out + (j * R + r) * L) * decays[r];
    const T* values = block.values + pair * 2 * L;
    const bool fetch = pair == 0 && block.is_new;
    for (int64_t k = 0; k < count; ++k, values += values_.seq) {
      if (fetch) prefetch(block.next + k * keys_.seq);
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) {
        V a, b;
        if (rest)
          load_pair(values + j * 2 * L, rest, a, b);
        else
          load_pair(values + j * 2 * L, a, b);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          sums[2 * j][r] += a * probabilities[k * R + r];
          sums[2 * j + 1][r] += b * probabilities[k * R + r];
        }
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < 2 * P; ++j)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) store(out + (j * R + r) * L, sums[j][r]);
  }

  // Pairs whose sums stay in registers: up to 16 of 32 in AVX-512, 8 of 16 elsewhere.
  static constexpr int kPairs = std::min((kVectorBytes == 64 ? 8 : 4) / R, 4);

  Shape s_;
  Rows<T> query_, keys_, values_;
  A scale_;
  int64_t pairs_;
};

}  // namespace aigc_fast

// The products of attention.h: queries with a few keys, probabilities with a block of values.
#pragma once

#include <algorithm>

#include "narrow.h"
#include "vector_pair.h"

namespace aigc_fast {

constexpr int64_t kMostKeys = 64;  // of a call

// R query rows, tiles of queries and results in pairs of vectors: [pair][2][R][L]. Keys and values
// are given by the address of each, so that they may lie anywhere; C is their type, A that of the
// arithmetic.
template <class Arithmetic, class Cached, int rows>
struct Products {
  using A = Arithmetic;
  using C = Cached;
  using V = Vec<A>;
  static constexpr int R = rows, L = kLanes<A>, K = L / R;  // lanes; keys of a vector of scores
  static constexpr int64_t kFewestKeys = K;                 // of a call, but the last of a block
  static_assert(L % R == 0 && kMostKeys % K == 0);
  int64_t head_dim;

  // Numbers in the queries of a tile, and what becomes of them before the first product.
  int64_t query_size() const { return (head_dim + 2 * L - 1) / (2 * L) * 2 * R * L; }
  void prepare(A*) const {}
  struct Thread {};  // what a thread has while it multiplies

  // The part of a row with the 2 * L numbers from d on into the cache, a line at most once. Always
  // inlined: GCC 12 drops calls of a function that does nothing else.
  AIGC_INLINE static void prefetch(const C* row, int64_t d) {
    constexpr int64_t kLine = 64, kBytes = 2 * L * sizeof(C);
    static_assert(kBytes <= 2 * kLine);
    const char* p = reinterpret_cast<const char*>(row + d);
    if constexpr (kBytes < kLine)
      if (d * sizeof(C) % kLine) return;
    __builtin_prefetch(p, 0, 3);
    if constexpr (kBytes > kLine) __builtin_prefetch(p + kLine, 0, 3);
  }

  // The products of `count` keys, rounded up to whole vectors, with the R queries of a tile:
  // scores[k * R + r]. Fetches as many rows of `next` into the cache, unless it is null.
  void scores(const A* query, const C* const* keys, int64_t count, const C* const* next,
              A* scores) const {
    for (int64_t k = 0; k < count; k += K)
      store(scores + k * R, scores_of(query, keys + k, (next ? next : keys) + k));
  }

  // result = result * decays + probabilities * values, for `count` values and the pairs of head_dim
  // from `pair` on. Fetches as many rows of `next` into the cache, unless it is null.
  void add_values(const A* probabilities, const C* const* values, int64_t count, const A* decays,
                  A* result, const C* const* next, int64_t pair = 0) const {
    add_all_values<kPairs>(probabilities, values, count, pair, decays, result, next);
  }

 private:
  // The products of K keys: lane k * R + r.
  V scores_of(const A* query, const C* const* keys, const C* const* next) const {
    const C* key[K];
    for (int k = 0; k < K; ++k) key[k] = keys[k];
    V sums[L] = {};
    auto add = [&](int64_t d, auto load) __attribute__((always_inline)) {
      const A* q = query + d * R;
      V even[K], odd[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        prefetch(next[k], d);
        load(key[k], even[k], odd[k]);
      }
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
    const int64_t whole = head_dim / (2 * L) * (2 * L), rest = head_dim - whole;
    for (int64_t d = 0; d < whole; d += 2 * L)
      add(d, [d](const C* p, V& a, V& b) { load_pair(p + d, a, b); });
    if (rest) add(whole, [=](const C* p, V& a, V& b) { load_pair(p + whole, rest, a, b); });
    return sum_each<A>(sums);
  }

  // All pairs of head_dim from `pair`, as many at a time as registers allow.
  template <int P>
  void add_all_values(const A* probabilities, const C* const* values, int64_t count, int64_t pair,
                      const A* decays, A* result, const C* const* next) const {
    const int64_t whole = head_dim / (2 * L), rest = head_dim % (2 * L);
    for (; pair + P <= whole; pair += P)
      add_pairs<P, false>(probabilities, values, count, pair, rest, decays, result, next);
    if constexpr (P > 1)
      add_all_values<P / 2>(probabilities, values, count, pair, decays, result, next);
    else if (rest)
      add_pairs<1, true>(probabilities, values, count, pair, rest, decays, result, next);
  }

  // P pairs of head_dim, or the `rest` elements of the last one.
  template <int P, bool partial>
  void add_pairs(const A* probabilities, const C* const* values, int64_t count, int64_t pair,
                 int64_t rest, const A* decays, A* result, const C* const* next) const {
    V sums[2 * P][R] = {};  // of this block alone: one chain over all keys would round more
    A* out = result + pair * 2 * R * L;
    for (int64_t k = 0; k < count; ++k) {
      const C* value = values[k] + pair * 2 * L;
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) {
        if (next) prefetch(next[k], (pair + j) * 2 * L);
        V a, b;
        if constexpr (partial)
          load_pair(value + j * 2 * L, rest, a, b);
        else
          load_pair(value + j * 2 * L, a, b);
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
      for (int r = 0; r < R; ++r) {
        A* to = out + (j * R + r) * L;
        store(to, load(to) * decays[r] + sums[j][r]);
      }
  }

  // Pairs whose sums stay in registers: up to 16 of 32 in AVX-512, 8 of 16 elsewhere.
  static constexpr int kPairs = std::min((kVectorBytes == 64 ? 8 : 4) / R, 4);
};

}  // namespace aigc_fast

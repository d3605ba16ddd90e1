// y = x @ weight^T for a few rows of x: the weight is read once, where it is.
//
// Along a row of the weight a vector of terms is multiplied at a time, 32 of bf16 by its
// instruction; the sums of a few rows of both are in registers, and their lanes are added in the
// end.
#pragma once

#include "linear_tile.h"
#include "two_vectors.h"

namespace aigc_fast {

// Rows of the weight at a time, which stay in the second cache for the next rows of x.
constexpr int64_t kFewColumns = 32;

// y[p * pitch + v] of P rows of x and V rows of the weight.
template <int P, int V, class T>
__attribute__((noinline)) void multiply_few(const T* x, int64_t x_pitch, const T* w,
                                            int64_t w_pitch, int64_t terms, float* y,
                                            int64_t pitch) {
  Vec<float> sums[V][P] = {};
  for_vectors<float>(terms, [&](int64_t t, auto n) {
    Vec<float> rows[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) rows[p] = load(x + p * x_pitch + t, n);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const T* from = w + v * w_pitch + t;
      __builtin_prefetch(from + kAhead<T>);
      const Vec<float> weights = load(from, n);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[v][p] += weights * rows[p];
    }
  });
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) y[p * pitch + v] = sum_lanes<float>(sums[v][p]);
}

#if AIGC_BF16_DOT
// The same by the instruction.
template <int P, int V>
__attribute__((target("avx512bf16"), noinline)) void multiply_few_by_dots(
    const bf16* x, int64_t x_pitch, const bf16* w, int64_t w_pitch, int64_t terms, float* y,
    int64_t pitch) {
  constexpr int64_t N = 2 * kLanes<float>;
  Vec<float> sums[V][P] = {};
  const auto add = [&](int64_t t,
                       __mmask32 lanes) __attribute__((target("avx512bf16"), always_inline)) {
    __m512bh rows[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      rows[p] = (__m512bh)_mm512_maskz_loadu_epi16(lanes, x + p * x_pitch + t);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const bf16* from = w + v * w_pitch + t;
      __builtin_prefetch(from + kAhead<bf16>);
      const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(lanes, from);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        sums[v][p] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[v][p], weights, rows[p]);
    }
  };
  int64_t t = 0;
  for (; t + N <= terms; t += N) add(t, ~0u);
  if (t < terms) add(t, (1u << (terms - t)) - 1);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) y[p * pitch + v] = sum_lanes<float>(sums[v][p]);
}

#endif

}  // namespace aigc_fast

// y = x @ weight^T for a few rows of x: the weight is read once, where it is.
//
// One row of the weight at a time, asked for far ahead, is what memory gives fastest here: 46 to 49
// GB/s for two cores, four rows at a time 36 to 44. Its terms are multiplied a vector at a time, 32
// of bf16 by its instruction; the sums are in registers, and their lanes are added in the end.
#pragma once

#include "linear_tile.h"

namespace aigc_fast {

// Rows of the weight at a time, which stay in the second cache for the next rows of x, and how far
// ahead they are asked for.
constexpr int64_t kFewColumns = 32, kBytesAhead = 8192;

// Sums of one product, so that none waits for the one before it.
template <int P>
constexpr int kChains = P <= 2 ? 4 : 2;

template <int P>
AIGC_INLINE void keep_sums(const Vec<float> (&sums)[kChains<P>][P], float* y, int64_t pitch) {
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    Vec<float> sum = {};
#pragma GCC unroll 4
    for (int c = 0; c < kChains<P>; ++c) sum += sums[c][p];
    y[p * pitch] = sum_lanes<float>(sum);
  }
}

// y[p * pitch] of P rows of x and one of the weight.
template <int P, class T>
__attribute__((noinline)) void multiply_few(const float* x, int64_t x_pitch, const T* w,
                                            int64_t terms, float* y, int64_t pitch) {
  constexpr int64_t N = kLanes<float>;
  Vec<float> sums[kChains<P>][P] = {};
  const auto add = [&](int64_t t, auto n, Vec<float>* sum) {
    __builtin_prefetch(w + t + kBytesAhead / sizeof(T), 0, 2);
    const Vec<float> weights = load(w + t, n);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] += weights * load(x + p * x_pitch + t, n);
  };
  int64_t t = 0;
  for (; t + kChains<P> * N <= terms; t += kChains<P> * N)
#pragma GCC unroll 4
    for (int c = 0; c < kChains<P>; ++c)
      add(t + c * N, std::integral_constant<int, kLanes<float>>{}, sums[c]);
  for_vectors<float>(terms - t, [&](int64_t i, auto n) { add(t + i, n, sums[0]); });
  keep_sums<P>(sums, y, pitch);
}

#if AIGC_BF16_DOT
// The same by the instruction.
template <int P>
__attribute__((target("avx512bf16"), noinline)) void multiply_few(const bf16* x, int64_t x_pitch,
                                                                  const bf16* w, int64_t terms,
                                                                  float* y, int64_t pitch) {
  constexpr int64_t N = 2 * kLanes<float>;
  Vec<float> sums[kChains<P>][P] = {};
  const auto add = [&](int64_t t, __mmask32 lanes,
                       Vec<float>* sum) __attribute__((target("avx512bf16"), always_inline)) {
    __builtin_prefetch(w + t + kBytesAhead / sizeof(bf16), 0, 2);
    const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(lanes, w + t);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(lanes, x + p * x_pitch + t);
      sum[p] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[p], weights, row);
    }
  };
  int64_t t = 0;
  for (; t + kChains<P> * N <= terms; t += kChains<P> * N)
#pragma GCC unroll 4
    for (int c = 0; c < kChains<P>; ++c) add(t + c * N, ~0u, sums[c]);
  for (; t + N <= terms; t += N) add(t, ~0u, sums[0]);
  if (t < terms) add(t, (1u << (terms - t)) - 1, sums[0]);
  keep_sums<P>(sums, y, pitch);
}
#endif

}  // namespace aigc_fast

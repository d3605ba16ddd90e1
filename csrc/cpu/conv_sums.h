// Sums of a convolution in registers, and those of outer products: of a gradient of weights.
#pragma once

#include "bf16_dot.h"
#include "tensor.h"

namespace aigc_fast {

constexpr int kConvPixels = kVectorBytes == 64 ? 12 : 6, kConvOuts = 2;

// Sums of kConvPixels pixels and kConvOuts vectors of channels.
template <class A>
struct ConvSums {
  Vec<A> of[kConvPixels][kConvOuts];
};

// The totals of the first P pixels and V vectors become these sums, or have them added. Unrolled,
// like every loop over them: else the sums stay in memory.
template <int P, class A, int V>
AIGC_INLINE void keep_sums(const Vec<A> (&sums)[P][V], bool add, ConvSums<A>& totals) {
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) totals.of[p][v] = add ? totals.of[p][v] + sums[p][v] : sums[p][v];
}

// The sums over `count` steps of the products of P rows' values with V vectors of lanes. Each
// step's rows lie side by side, rows_pitch behind the one before, and so do its lanes.
template <int P, int V, class A>
AIGC_INLINE void add_outer_products(const A* rows, int64_t rows_pitch, const A* lanes,
                                    int64_t lanes_pitch, int64_t count, bool add,
                                    ConvSums<A>& totals) {
  Vec<A> sums[P][V] = {};
  for (int64_t t = 0; t < count; ++t, rows += rows_pitch, lanes += lanes_pitch) {
    Vec<A> all[V];
    for (int v = 0; v < V; ++v) all[v] = load(lanes + v * kLanes<A>);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[p][v] += rows[p] * all[v];
  }
  keep_sums<P, A>(sums, add, totals);
}

#if AIGC_BF16_DOT
// The same of pairs, two steps at once. Subnormal numbers count as zero.
template <int P, int V>
__attribute__((target("avx512bf16"), noinline)) void add_outer_products(
    const Bf16Pair* rows, int64_t rows_pitch, const Bf16Pair* lanes, int64_t lanes_pitch,
    int64_t count, bool add, ConvSums<float>& totals) {
  Vec<float> sums[P][V] = {};
  const auto multiply = [&](__m512i kept) __attribute__((target("avx512bf16"), always_inline)) {
    __m512bh all[V];
    for (int v = 0; v < V; ++v)
      all[v] = (__m512bh)_mm512_and_si512(_mm512_loadu_si512(lanes + v * kLanes<float>), kept);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
      const __m512i row = _mm512_set1_epi32(static_cast<int32_t>(rows[p]));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        sums[p][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[p][v], all[v],
                                                  (__m512bh)_mm512_and_si512(row, kept));
    }
  };
  int64_t t = 0;
  for (; t + 2 <= count; t += 2, rows += 2 * rows_pitch, lanes += 2 * lanes_pitch)
    multiply(_mm512_set1_epi32(-1));
  if (t < count) multiply(_mm512_set1_epi32(0xffff));
  keep_sums<P, float>(sums, add, totals);
}
#endif

}  // namespace aigc_fast

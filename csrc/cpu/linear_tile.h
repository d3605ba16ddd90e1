// The products of a few rows and columns (linear.cpp), in registers.
#pragma once

#include "bf16_dot.h"
#include "tensor.h"

namespace aigc_fast {

// Where the sums of a tile go, `pitch` between rows: they are added to what is there, or, the first
// ones, to a bias.
struct Sums {
  float* data;
  int64_t pitch, columns;
  bool more;
  const float* bias;
};

constexpr int64_t L = kLanes<float>;
// A tile: all but a few of the registers.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4, kVectors = 3;
constexpr int64_t kGroup = kVectors * L;

template <int P, int V>
AIGC_INLINE void keep(const Vec<float> (&sums)[P][V], const Sums& to) {
  const int64_t lanes = to.columns - (V - 1) * L;  // of the last vector
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* y = to.data + p * to.pitch + v * L;
      const float* start = to.more ? y : to.bias ? to.bias + v * L : nullptr;
      if (v < V - 1 || lanes >= L)
        store(y, start ? load(start) + sums[p][v] : sums[p][v]);
      else
        store_n(y, start ? load_n(start, lanes) + sums[p][v] : sums[p][v], lanes);
    }
}

// The products of P rows of x and V vectors of columns, [term][kGroup].
template <int P, int V>
__attribute__((noinline)) void multiply_tile(const float* x, int64_t pitch, int64_t terms,
                                             const float* w, const Sums& to) {
  Vec<float> sums[P][V] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < terms; ++t, w += kGroup) {
    Vec<float> weights[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) weights[v] = load(w + v * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[p][v] += x[p * pitch + t] * weights[v];
  }
  keep(sums, to);
}

#if AIGC_BF16_DOT
// The same of pairs of terms: the columns are [term / 2][kGroup][2]. Subnormal numbers count as
// zero.
template <int P, int V>
__attribute__((target("avx512bf16"), noinline)) void multiply_tile(const bf16* x, int64_t pitch,
                                                                   int64_t terms, const bf16* w,
                                                                   const Sums& to) {
  Vec<float> sums[P][V] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < terms; t += 2, w += 2 * kGroup) {
    __m512bh weights[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + v * 2 * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      int32_t pair;
      std::memcpy(&pair, x + p * pitch + t, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v)
        sums[p][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[p][v], weights[v], both);
    }
  }
  keep(sums, to);
}
#endif

// The same of `rows` rows, P or fewer.
template <int P, class S>
void multiply_rows(int64_t rows, const S* x, int64_t pitch, int64_t terms, const S* w, Sums to) {
  if (rows >= P) {
    using Tile = void (*)(const S*, int64_t, int64_t, const S*, const Sums&);
    const Tile multiply = to.columns <= L       ? Tile(&multiply_tile<P, 1>)
                          : to.columns <= 2 * L ? Tile(&multiply_tile<P, 2>)
                                                : Tile(&multiply_tile<P, kVectors>);
    multiply(x, pitch, terms, w, to);
    rows -= P, x += P * pitch, to.data += P * to.pitch;
  }
  if constexpr (P > 1)
    if (rows > 0) multiply_rows<P / 2>(rows, x, pitch, terms, w, to);
}

}  // namespace aigc_fast

// Sums along a row, and sums in fp64.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include <aigc_fast/vec.h>

namespace aigc_fast {

// The N sums over [0, width) that f(i, lanes, sums) adds to, in four chains of additions so that
// none waits for the one before it; the order depends on width alone.
template <class A, int N, class F>
AIGC_INLINE std::array<A, N> sums_over(int64_t width, F&& f) {
  constexpr int lanes = kLanes<A>, chains = 4;
  Vec<A> sums[chains][N] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= width; i += chains * lanes)
#pragma GCC unroll 4  // else the sums stay in memory
    for (int k = 0; k < chains; ++k)
      f(i + k * lanes, std::integral_constant<int, lanes>{}, sums[k]);
  for_vectors<A>(width - i, [&](int64_t j, auto n) { f(i + j, n, sums[0]); });
  std::array<A, N> total;
  for (int s = 0; s < N; ++s)
    total[s] = sum_lanes<A>((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
  return total;
}

typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
AIGC_INLINE Vec<double> in_fp64(HalfVector v) {
  // GCC 12 makes four instructions of __builtin_convertvector here.
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, Vec<double>);
#endif
}

// kLanes<double> elements in fp64.
template <class A>
AIGC_INLINE Vec<double> load_wide(const A* p) {
  if constexpr (std::is_same_v<A, double>) {
    return load(p);
  } else {
    HalfVector half;
    std::memcpy(&half, p, sizeof half);
    return in_fp64(half);
  }
}

// A vector in fp64, the halves of one where A is float. The gradient of a parameter may be the sum
// of millions of terms of either sign: products and sums in fp64 leave it as exact as its terms.
template <class A>
struct Wide {
  static constexpr int kHalves = sizeof(double) / sizeof(A);
  Vec<double> half[kHalves] = {};

  AIGC_INLINE void operator+=(const Wide& other) {
    for (int h = 0; h < kHalves; ++h) half[h] += other.half[h];
  }
  AIGC_INLINE Wide operator*(const Wide& other) const {
    Wide result;
    for (int h = 0; h < kHalves; ++h) result.half[h] = half[h] * other.half[h];
    return result;
  }
  AIGC_INLINE double sum() const {
    Vec<double> total = half[0];
    for (int h = 1; h < kHalves; ++h) total += half[h];
    return sum_lanes<double>(total);
  }
};
template <int... i>
AIGC_INLINE HalfVector lanes_of(Vec<float> v, int first, std::integer_sequence<int, i...>) {
  return first ? __builtin_shufflevector(v, v, (int(sizeof...(i)) + i)...)
               : __builtin_shufflevector(v, v, i...);
}
template <class A>
AIGC_INLINE Wide<A> widen(Vec<A> v) {
  if constexpr (std::is_same_v<A, double>) {
    return {{v}};
  } else {
    constexpr std::make_integer_sequence<int, kLanes<double>> half;
    return {{in_fp64(lanes_of(v, 0, half)), in_fp64(lanes_of(v, kLanes<double>, half))}};
  }
}
// to[i] += v[i] in the first `lanes` lanes.
template <class A, class N>
AIGC_INLINE void add_to(double* to, const Wide<A>& v, N lanes) {
  for (int h = 0; h < Wide<A>::kHalves; ++h, to += kLanes<double>) {
    if constexpr (std::is_same_v<N, int>) {
      const int n = std::min(kLanes<double>, lanes - h * kLanes<double>);
      if (n > 0) store_n(to, load_n(to, n) + v.half[h], n);
    } else {
      store(to, load(to) + v.half[h]);
    }
  }
}

// out[j] = partial[j] + partial[j + stride] + ..., `count` terms. The last sums are the largest:
// in fp32 their rounding would be most of the error.
template <class T, class P>
void add_partial_sums(const P* partial, int64_t count, int64_t stride, int64_t width, T* out) {
  using A = Acc<T>;
  std::vector<double> total(width);
  for (int64_t i = 0; i < count; ++i, partial += stride) {
    int64_t j = 0;
    for (; j + kLanes<double> <= width; j += kLanes<double>)
      store(total.data() + j, load(total.data() + j) + load_wide(partial + j));
    for (; j < width; ++j) total[j] += partial[j];
  }
  const std::vector<A> rounded(total.begin(), total.end());
  convert(rounded.data(), width, out);
}

}  // namespace aigc_fast

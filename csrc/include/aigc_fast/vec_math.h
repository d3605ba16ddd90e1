// The functions of vectors that the CPU kernels need: of two, and the transcendental ones.
#pragma once

#include <cmath>
#include <limits>

#include <aigc_fast/vec.h>

namespace aigc_fast {

template <class A, class F>
AIGC_INLINE Vec<A> each_lane(Vec<A> v, F f) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = f(v[i]);
  return v;
}

template <class A>
AIGC_INLINE Vec<A> abs(Vec<A> x) {
  return x < 0 ? -x : x;
}
template <class A>
AIGC_INLINE Vec<A> minus_abs(Vec<A> x) {
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Vec<Bits<A>>>(x) |
                                  std::numeric_limits<Bits<A>>::min());
}
// NaN in a stays NaN, as in torch.clamp: the instructions return their second operand then.
template <class A>
AIGC_INLINE Vec<A> min(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm512_min_ps((__m512)b, (__m512)a);
#endif
  return a > b ? b : a;
}
template <class A>
AIGC_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm512_max_ps((__m512)b, (__m512)a);
#endif
  return a < b ? b : a;
}

template <class A>
AIGC_INLINE Vec<A> sqrt(Vec<A> x) {
  return each_lane<A>(x, [](A v) { return std::sqrt(v); });
}

// The polynomial of these coefficients, the highest power's first, by Horner's rule.
template <class A, class... More>
AIGC_INLINE Vec<A> polynomial(Vec<A> x, A first, More... more) {
  Vec<A> p = broadcast(first);
  ((p = p * x + static_cast<A>(more)), ...);
  return p;
}

// e^r - 1 - r for |r| <= ln(2)/2: the part of exp that a polynomial gives.
// Minimax coefficients of expf (Cephes, S. Moshier), relative error under 2^-24.
AIGC_INLINE Vec<float> exp_tail(Vec<float> r) {
  return polynomial<float>(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f) *
         r * r;
}

template <class A>
AIGC_INLINE Vec<A> exp(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return each_lane<A>(x, [](A v) { return std::exp(v); });
  } else {
    // x = n ln2 + r; the magic constant rounds to nearest by pushing the fraction out.
    Vec<float> c = max<float>(min<float>(x, broadcast(89.0f)), broadcast(-104.0f));
    Vec<float> shifted = c * 1.44269504089f + 12582912.0f;
    Vec<float> n = shifted - 12582912.0f;
    Vec<float> r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<float> y = exp_tail(r) + r + 1.0f;
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    // 2^n in two factors, so that results down to the smallest denormal come out right.
    typedef Vec<int32_t> I;
    I k = __builtin_convertvector(n, I);
    I half = k >> 1;
    Vec<float> s1 = reinterpret_cast<Vec<float>>((half + 127) << 23);
    Vec<float> s2 = reinterpret_cast<Vec<float>>((k - half + 127) << 23);
    return x == x ? y * s1 * s2 : x;
#endif
  }
}

// e^x - 1 without cancellation near zero.
template <class A>
AIGC_INLINE Vec<A> expm1(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return each_lane<A>(x, [](A v) { return std::expm1(v); });
  } else {
    Vec<float> near = exp_tail(x) + x;
    Vec<float> far = exp<float>(x) - 1.0f;
    return abs<float>(x) < 0.34f ? near : far;
  }
}

// log(1 + f) - f for 1 + f from sqrt(1/2) to sqrt(2): logf (Cephes).
AIGC_INLINE Vec<float> log1p_tail(Vec<float> f) {
  const Vec<float> z = f * f;
  const Vec<float> p = polynomial<float>(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                                         -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                                         2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  return f * z * p - 0.5f * z;
}

// log(1 + e) for e in [0, 1].
template <class A>
AIGC_INLINE Vec<A> log1p_unit(Vec<A> e) {
  if constexpr (std::is_same_v<A, double>) {
    return each_lane<A>(e, [](A v) { return std::log1p(v); });
  } else {
    Vec<float> u = e + 1.0f;
    // u in [1, 2]: fold [sqrt 2, 2] to [sqrt 1/2, 1]; the rounding of 1 + e is added back.
    Vec<float> lost = (e - (u - 1.0f)) / u;
    auto upper = u > 1.41421356f;
    Vec<float> f = (upper ? u * 0.5f : u) - 1.0f;
    Vec<float> y = log1p_tail(f);
    Vec<float> zero = {};
    y = y + (upper ? zero - 2.12194440e-4f : zero);
    return f + y + (upper ? zero + 0.693359375f : zero) + lost;
  }
}

// 1 / x for x in [1, 2].
template <class A>
AIGC_INLINE Vec<A> reciprocal_unit(Vec<A> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    // A division takes 16 cycles, the estimate and a Newton step to full precision 4.
    const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
  }
#endif
  return A(1) / x;
}

template <class A>
AIGC_INLINE Vec<A> sigmoid(Vec<A> x) {
  // The exponential of -|x| does not overflow, and keeps the relative precision far below zero.
  const Vec<A> e = exp<A>(minus_abs<A>(x));
  const Vec<A> r = reciprocal_unit<A>(A(1) + e);
  return x < 0 ? e * r : r;
}

template <class A>
AIGC_INLINE Vec<A> tanh(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return each_lane<A>(x, [](A v) { return std::tanh(v); });
  } else {
    Vec<float> a = abs<float>(x);
    Vec<float> e = exp<float>(-2.0f * a);
    Vec<float> far = (1.0f - e) / (1.0f + e);
    far = x < 0 ? -far : far;
    // Cephes tanhf below 0.625, where 1 - e cancels.
    Vec<float> z = x * x;
    const Vec<float> p =
        polynomial<float>(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                          1.33314422036e-1f, -3.33332819422e-1f);
    return a < 0.625f ? p * z * x + x : far;
  }
}

}  // namespace aigc_fast

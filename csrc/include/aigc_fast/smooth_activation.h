// The smooth activations that follow a norm or open a gate: silu and the two gelus.
#pragma once

#include <aigc_fast/vec_math.h>

namespace aigc_fast {

enum class Smooth : int64_t { none, silu, gelu, gelu_tanh };
constexpr int64_t kNumSmooth = 4;

// Whether an activation whose result is rounded to T may be coarse: silu takes 9 or 10 instructions
// in place of 21. Its relative error, 2^-14 for fp16 and 2^-12.8 for bf16, is an eighth or less of
// what the rounding adds.
template <class T>
constexpr bool kCoarse = sizeof(T) == 2;

// e^-|x|
template <class A, bool coarse = false>
AIGC_INLINE Vec<A> exp_minus_abs(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return exp<double>(minus_abs<double>(x));
  } else {
#if defined(__AVX512F__)
    if constexpr (coarse) {
      // 2^(n + f), |f| <= 1/2; the minimax polynomial of 2^f is off by 2.8e-6 at most.
      const Vec<float> c = max<float>(minus_abs<float>(x), broadcast(-104.0f));
      const Vec<float> n = (c * 1.44269504089f + 12582912.0f) - 12582912.0f;
      const Vec<float> f = c * 1.44269504089f - n;
      const Vec<float> p =
          polynomial<float>(f, 9.5828530e-3f, 5.5906425e-2f, 2.4024099e-1f, 6.9312419e-1f, 1.0f);
      return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
    }
    // exp() of vec.h with one clamp and no separate last steps: 13 instructions in place of 17.
    const Vec<float> c = max<float>(minus_abs<float>(x), broadcast(-104.0f));
    const Vec<float> n = (c * 1.44269504089f + 12582912.0f) - 12582912.0f;
    Vec<float> r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    const Vec<float> p =
        polynomial<float>(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                          1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f);
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return exp<float>(minus_abs<float>(x));
#endif
  }
}

// 1 / (1 + e) for e >= 0, not infinite.
template <class A, bool coarse>
AIGC_INLINE Vec<A> one_over_one_plus(Vec<A> e) {
#if defined(__AVX512F__)
  if constexpr (coarse) return (Vec<float>)_mm512_rcp14_ps((__m512)(1.0f + e));  // within 2^-14
#endif
  return reciprocal_unit<A>(A(1) + e);
}

#if defined(__AVX512F__)
// 1 / (1 + e^-x), as exact as a result in T needs; 0 below -88, where e^-x is infinite.
template <class T>
AIGC_INLINE Vec<float> coarse_sigmoid(Vec<float> x) {
  // e^-x = 2^t; the minimax polynomial of 2^(t - floor t) is off by 7.5e-5 or 2.6e-6 at most, and
  // the estimate of the reciprocal by 2^-14.
  const __m512 t = (__m512)(x * -1.44269504089f);
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> p;
  if constexpr (std::is_same_v<T, bf16>) {
    p = polynomial<float>(f, 7.8024523e-2f, 2.2606716e-1f, 6.9583354e-1f, 9.9992522e-1f);
  } else {
    p = polynomial<float>(f, 1.3534168e-2f, 5.2011461e-2f, 2.4144276e-1f, 6.9300383e-1f,
                          1.0000026f);
  }
  const Vec<float> e = (Vec<float>)_mm512_scalef_ps((__m512)p, t);  // p * 2^(floor t)
  return (Vec<float>)_mm512_rcp14_ps((__m512)(1.0f + e));
}
#endif

// The standard normal distribution's density and cumulative distribution at x.
template <class A>
struct Normal {
  Vec<A> density, cumulative;
};
template <class A, bool coarse>
AIGC_INLINE Normal<A> normal(Vec<A> x) {
  constexpr A kInverseSqrt2Pi = A(0.398942280401432677939946);
  if constexpr (std::is_same_v<A, double>) {
    return {
        each_lane<A>(x, [](A v) { return kInverseSqrt2Pi * std::exp(A(-0.5) * v * v); }),
        each_lane<A>(x, [](A v) { return A(0.5) * std::erfc(v * A(-0.70710678118654752440)); })};
  } else {
    // The tail beyond |x| is exp(-x^2 / 2) * t * p(t), t = 1 / (1 + 0.3 |x|): relative error of
    // the minimax polynomial 3.5e-9, or 8.9e-6 of the coarse one, up to |x| = 14.5, below which
    // fp32 has nothing left. So small values keep their relative precision, which 1 + erf(x) loses.
    const Vec<float> z = x * x, e = exp_minus_abs<float, coarse>(0.5f * z);
    const Vec<float> t =
        one_over_one_plus<float, coarse>(0.3f * min<float>(abs<float>(x), broadcast(16.0f)));
    if constexpr (coarse) {
      const Vec<float> p = polynomial<float>(t, -7.6700014e-2f, 2.1484713e-1f, -1.559524e-2f,
                                             1.4347194e-1f, 1.1392325e-1f, 1.2005737e-1f);
      const Vec<float> tail = e * (t * p);
      return {e * kInverseSqrt2Pi, x < 0 ? tail : 1.0f - tail};
    }
    const Vec<float> p =
        polynomial<float>(t, -2.0623469305e-2f, 1.1243561439e-1f, -2.2821360255e-1f,
                          1.9178453797e-1f, -7.9423493785e-2f, 9.6156833974e-2f, 7.8389648925e-2f,
                          1.1023542488e-1f, 1.1957181386e-1f, 1.1968668982e-1f);
    const Vec<float> tail = e * (t * p);
    // Below 1 the odd polynomial of Phi - 1/2 (relative error 7e-10) rounds less.
    const Vec<float> q =
        polynomial<float>(z, -7.6542086683e-6f, 1.1348637271e-4f, -1.1863299425e-3f,
                          9.9733234101e-3f, -6.6490359924e-2f, 3.9894228012e-1f);
    const Vec<float> far = x < 0 ? tail : 1.0f - tail;
    return {e * kInverseSqrt2Pi, z < 1 ? 0.5f + q * x : far};
  }
}

// u of gelu's tanh form, (1 + tanh(u / 2)) / 2 being sigmoid(u).
template <class A>
AIGC_INLINE Vec<A> gelu_argument(Vec<A> x) {
  constexpr A k = A(1.59576912160573071176);  // sqrt(8 / pi)
  return k * x * (A(1) + A(0.044715) * x * x);
}

// act(x), to be rounded to T
template <Smooth act, class A, class T = A>
AIGC_INLINE Vec<A> smooth(Vec<A> x) {
  constexpr bool coarse = kCoarse<T>;
  if constexpr (act == Smooth::none) {
    return x;
  } else if constexpr (act == Smooth::gelu) {
    return x * normal<A, coarse>(x).cumulative;
  } else {
    const Vec<A> u = act == Smooth::silu ? x : gelu_argument<A>(x);
#if defined(__AVX512F__)
    if constexpr (coarse) return x * coarse_sigmoid<T>(u);
#endif
    const Vec<A> e = exp_minus_abs<A, coarse>(u), r = one_over_one_plus<A, coarse>(e);
    return (u < 0 ? x * e : x) * r;
  }
}

// act(x) and its derivative, to be rounded to T.
template <class A>
struct Activated {
  Vec<A> value, slope;
};
template <Smooth act, class A, class T = A>
AIGC_INLINE Activated<A> activate(Vec<A> x) {
  constexpr bool coarse = kCoarse<T>;
  if constexpr (act == Smooth::none) {
    return {x, broadcast(A(1))};
  } else if constexpr (act == Smooth::gelu) {
    const Normal<A> n = normal<A, coarse>(x);
    return {x * n.cumulative, n.cumulative + x * n.density};
  } else {
    constexpr A k = A(1.59576912160573071176), c = A(3 * 0.044715);
    constexpr bool silu = act == Smooth::silu;
    const Vec<A> u = silu ? x : gelu_argument<A>(x);
    const Vec<A> du = silu ? broadcast(A(1)) : k * (A(1) + c * x * x);
    // sigmoid(u) and sigmoid(-u), which 1 - sigmoid(u) would give without its small values.
    const Vec<A> e = exp_minus_abs<A, coarse>(u), r = one_over_one_plus<A, coarse>(e), q = e * r;
    const Vec<A> value = x * (u < 0 ? q : r);
    return {value, (u < 0 ? q : r) + value * du * (u < 0 ? r : q)};
  }
}

}  // namespace aigc_fast

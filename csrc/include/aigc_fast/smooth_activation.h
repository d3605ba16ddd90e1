// The smooth activations that follow a norm or open a gate: silu and the two gelus.
#pragma once

#include <aigc_fast/vec.h>

namespace aigc_fast {

enum class Smooth : int64_t { none, silu, gelu, gelu_tanh };
constexpr int64_t kNumSmooth = 4;

// e^-|x|
template <class A>
AIGC_INLINE Vec<A> exp_minus_abs(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return exp<double>(minus_abs<double>(x));
  } else {
#if defined(__AVX512F__)
    // exp() of vec.h with one clamp and no separate last steps: 13 instructions in place of 17.
    const Vec<float> c = max<float>(minus_abs<float>(x), broadcast(-104.0f));
    const Vec<float> n = (c * 1.44269504089f + 12582912.0f) - 12582912.0f;
    Vec<float> r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<float> p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return exp<float>(minus_abs<float>(x));
#endif
  }
}

// u of gelu's tanh form, (1 + tanh(u / 2)) / 2 being sigmoid(u).
template <class A>
AIGC_INLINE Vec<A> gelu_argument(Vec<A> x) {
  constexpr A k = A(1.59576912160573071176);  // sqrt(8 / pi)
  return k * x * (A(1) + A(0.044715) * x * x);
}

// act(x)
template <Smooth act, class A>
AIGC_INLINE Vec<A> smooth(Vec<A> x) {
  if constexpr (act == Smooth::none) {
    return x;
  } else if constexpr (act == Smooth::gelu) {
    return x * normal<A>(x).cumulative;
  } else {
    const Vec<A> u = act == Smooth::silu ? x : gelu_argument<A>(x);
    const Vec<A> e = exp_minus_abs<A>(u), r = reciprocal_unit<A>(A(1) + e);
    return (u < 0 ? x * e : x) * r;
  }
}

// act(x) and its derivative.
template <class A>
struct Activated {
  Vec<A> value, slope;
};
template <Smooth act, class A>
AIGC_INLINE Activated<A> activate(Vec<A> x) {
  if constexpr (act == Smooth::none) {
    return {x, broadcast(A(1))};
  } else if constexpr (act == Smooth::gelu) {
    const Normal<A> n = normal<A>(x);
    return {x * n.cumulative, n.cumulative + x * n.density};
  } else {
    constexpr A k = A(1.59576912160573071176), c = A(3 * 0.044715);
    constexpr bool silu = act == Smooth::silu;
    const Vec<A> u = silu ? x : gelu_argument<A>(x);
    const Vec<A> du = silu ? broadcast(A(1)) : k * (A(1) + c * x * x);
    // sigmoid(u) and sigmoid(-u), which 1 - sigmoid(u) would give without its small values.
    const Vec<A> e = exp_minus_abs<A>(u), r = reciprocal_unit<A>(A(1) + e), q = e * r;
    const Vec<A> value = x * (u < 0 ? q : r);
    return {value, (u < 0 ? q : r) + value * du * (u < 0 ? r : q)};
  }
}

}  // namespace aigc_fast

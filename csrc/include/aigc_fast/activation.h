// The nine activations of bias_act with their first and second derivatives, element by element.
#pragma once

#include <aigc_fast/vec_math.h>

namespace aigc_fast {

// The numbers are part of the operator's schema: aigc_fast/ops/bias_act.py holds the same list.
enum class Act : int64_t { linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish };
constexpr int64_t kNumActs = 9;

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

// act(x); alpha is the slope of lrelu and the scale of elu.
template <Act act, class A>
AIGC_INLINE Vec<A> activate(Vec<A> x, A alpha) {
  const Vec<A> zero = {};
  if constexpr (act == Act::linear) return x;
  if constexpr (act == Act::relu) return x < 0 ? zero : x;
  if constexpr (act == Act::lrelu) return x < 0 ? x * alpha : x;
  if constexpr (act == Act::tanh) return tanh<A>(x);
  if constexpr (act == Act::sigmoid) return sigmoid<A>(x);
  if constexpr (act == Act::elu) return x < 0 ? alpha * expm1<A>(x) : x;
  if constexpr (act == Act::selu) return A(kSeluScale) * (x < 0 ? A(kSeluAlpha) * expm1<A>(x) : x);
  if constexpr (act == Act::softplus) return max<A>(x, zero) + log1p_unit<A>(exp<A>(-abs<A>(x)));
  if constexpr (act == Act::swish) return x * sigmoid<A>(x);
}

// The derivative of sigmoid. s (1 - s) would lose the digits of s where it comes close to 1.
template <class A>
AIGC_INLINE Vec<A> sigmoid_slope(Vec<A> x) {
  const Vec<A> e = exp<A>(minus_abs<A>(x)), r = reciprocal_unit<A>(A(1) + e);
  return e * r * r;
}

// d act / dx
template <Act act, class A>
AIGC_INLINE Vec<A> slope(Vec<A> x, A alpha) {
  const Vec<A> one = broadcast(A(1)), zero = {};
  if constexpr (act == Act::linear) return one;
  if constexpr (act == Act::relu) return x > 0 ? one : zero;
  if constexpr (act == Act::lrelu) return x > 0 ? one : zero + alpha;
  if constexpr (act == Act::tanh) {
    // 4 e / (1 + e)^2: 1 - y * y cancels where tanh saturates.
    const Vec<A> e = exp<A>(A(-2) * abs<A>(x)), u = A(1) + e;
    return A(4) * e / (u * u);
  }
  if constexpr (act == Act::sigmoid) return sigmoid_slope<A>(x);
  if constexpr (act == Act::elu) return x > 0 ? one : alpha * exp<A>(x);
  if constexpr (act == Act::selu) return A(kSeluScale) * (x > 0 ? one : A(kSeluAlpha) * exp<A>(x));
  if constexpr (act == Act::softplus) return sigmoid<A>(x);
  if constexpr (act == Act::swish) return sigmoid<A>(x) + x * sigmoid_slope<A>(x);
}

// d^2 act / dx^2
template <Act act, class A>
AIGC_INLINE Vec<A> curvature(Vec<A> x, A alpha) {
  const Vec<A> zero = {};
  if constexpr (act == Act::tanh) {
    const Vec<A> y = tanh<A>(x);
    return A(-2) * y * slope<Act::tanh, A>(x, alpha);
  } else if constexpr (act == Act::sigmoid || act == Act::softplus) {
    const Vec<A> d = sigmoid_slope<A>(x);
    return act == Act::softplus ? d : d * (A(1) - A(2) * sigmoid<A>(x));
  } else if constexpr (act == Act::elu) {
    return x > 0 ? zero : alpha * exp<A>(x);
  } else if constexpr (act == Act::selu) {
    return x > 0 ? zero : A(kSeluScale * kSeluAlpha) * exp<A>(x);
  } else if constexpr (act == Act::swish) {
    return sigmoid_slope<A>(x) * (A(2) + x * (A(1) - A(2) * sigmoid<A>(x)));
  } else {
    return zero;
  }
}

}  // namespace aigc_fast

// What snake, x + sin^2(alpha x) / beta, and its derivatives need of the sine.
#pragma once

#include <aigc_fast/lane_bits.h>

namespace aigc_fast {

// What is added to beta before the division, as in BigVGAN and DAC.
constexpr double kSnakeEps = 1e-9;

// sin^2(u), sin(2u) and cos(2u); what is not used costs nothing.
template <class A>
struct Sines {
  Vec<A> squared, sin_twice, cos_twice;
};

// Lane by lane through the C library, which reduces arguments of any size.
template <class A>
[[gnu::noinline]] Sines<A> sines_of_any(Vec<A> u) {
  Sines<A> result;
  for (int k = 0; k < kLanes<A>; ++k) {
    const double s = std::sin(static_cast<double>(u[k])), c = std::cos(static_cast<double>(u[k]));
    result.squared[k] = static_cast<A>(s * s);
    result.sin_twice[k] = static_cast<A>(2 * s * c);
    result.cos_twice[k] = static_cast<A>(c * c - s * s);
  }
  return result;
}

template <class A>
AIGC_INLINE Sines<A> sines(Vec<A> u) {
  if constexpr (std::is_same_v<A, double>) {
    return sines_of_any<A>(u);
  } else {
    // Beyond n = 8192 quarter turns n times the parts of pi/2 below would no longer be exact.
    if (__builtin_expect(lane_bits<float>(abs<float>(u) > 12800.0f) != 0, 0))
      return sines_of_any<float>(u);
    // u = n pi/2 + r, |r| <= pi/4; the magic constant rounds to nearest by pushing the fraction
    // out and leaves n's last bit as its own. The parts of pi/2 have 8, 11 and 24 bits.
    const Vec<float> shifted = u * 0.636619772f + 12582912.0f, n = shifted - 12582912.0f;
    Vec<float> r = u - n * 1.5703125f;
    r = r - n * 4.837512969970703125e-4f;
    r = r - n * 7.54978995489188216e-8f;
    // sin^2(r) and sin(2r) by minimax polynomials of their own, with relative errors under 2^-26:
    // products of sin(r) and cos(r) would round twice more.
    const Vec<float> z = r * r, t = r + r, zt = t * t;
    Vec<float> p = broadcast(1.3474253938e-4f);
    p = p * z - 3.1712938404e-3f;
    p = p * z + 4.4443759425e-2f;
    p = p * z - 3.3333328889e-1f;
    const Vec<float> square = p * z * z + z;
    Vec<float> q = broadcast(2.6057505956e-6f);
    q = q * zt - 1.9809590059e-4f;
    q = q * zt + 8.3330660822e-3f;
    q = q * zt - 1.6666659545e-1f;
    // An odd n exchanges sine and cosine and turns the sign at twice the angle. 1 - square is at
    // least 1/2: nothing cancels.
    typedef Vec<int32_t> I;
    const I last = reinterpret_cast<I>(shifted) << 31;
    const auto turned = [&](Vec<float> v) {
      return reinterpret_cast<Vec<float>>(reinterpret_cast<I>(v) ^ last);
    };
    return {last != 0 ? 1.0f - square : square, turned(q * zt * t + t),
            turned(1.0f - 2.0f * square)};
  }
}

}  // namespace aigc_fast

// What snake, x + sin^2(alpha x) / beta, and its derivatives need of the sine.
#pragma once

#include <aigc_fast/lane_bits.h>
#include <aigc_fast/vec_math.h>

namespace aigc_fast {

// What is added to beta before the division, as in BigVGAN and DAC.
constexpr double kSnakeEps = 1e-9;

// sin^2(u), sin(2u) and cos(2u); what is not used costs nothing.
template <class A>
struct Sines {
  Vec<A> squared, sin_twice, cos_twice;
};

// For |u| up to kLargeSine.
template <class A>
AIGC_INLINE Sines<A> sines_of_small(Vec<A> u) {
  // u = n pi/2 + r, |r| <= pi/4; the magic constant rounds to nearest by pushing the fraction
  // out and leaves n's last bit as its own. The parts of pi/2 have 8, 11 and 24 bits.
  constexpr A magic = sizeof(A) == 8 ? A(6755399441055744.0) : A(12582912.0);
  const Vec<A> shifted = u * A(0.636619772367581343) + magic, n = shifted - magic;
  Vec<A> r = u - n * A(1.5703125);
  r = r - n * A(4.837512969970703125e-4);
  r = r - n * A(7.54978995489188216e-8);
  // sin^2(r) and sin(2r) by minimax polynomials of their own, with relative errors under 2^-26:
  // products of sin(r) and cos(r) would round twice more.
  const Vec<A> z = r * r, t = r + r, zt = t * t;
  const Vec<A> p =
      polynomial<A>(z, A(1.3474253938e-4), -3.1712938404e-3, 4.4443759425e-2, -3.3333328889e-1);
  const Vec<A> square = p * z * z + z;
  const Vec<A> q =
      polynomial<A>(zt, A(2.6057505956e-6), -1.9809590059e-4, 8.3330660822e-3, -1.6666659545e-1);
  // An odd n exchanges sine and cosine and turns the sign at twice the angle. 1 - square is at
  // least 1/2: nothing cancels.
  typedef Vec<Bits<A>> I;
  const I last = reinterpret_cast<I>(shifted) << (8 * sizeof(A) - 1);
  const auto turned = [&](Vec<A> v) {
    return reinterpret_cast<Vec<A>>(reinterpret_cast<I>(v) ^ last);
  };
  return {last != 0 ? A(1) - square : square, turned(q * zt * t + t), turned(A(1) - A(2) * square)};
}
// Beyond n = 8192 quarter turns n times the parts of pi/2 would no longer be exact.
constexpr double kLargeSine = 12800;

// Lanes of |u| over `most` through the C library, which reduces arguments of any size; the others
// as above, so that a lane does not depend on its neighbours.
template <class A>
[[gnu::noinline]] Sines<A> sines_of_any(Vec<A> u, A most) {
  Sines<A> result = sines_of_small<A>(u);
  for (int k = 0; k < kLanes<A>; ++k) {
    if (std::abs(u[k]) <= most) continue;
    const double s = std::sin(static_cast<double>(u[k])), c = std::cos(static_cast<double>(u[k]));
    result.squared[k] = static_cast<A>(s * s);
    result.sin_twice[k] = static_cast<A>(2 * s * c);
    result.cos_twice[k] = static_cast<A>(c * c - s * s);
  }
  return result;
}

// T: the tensor's type. Unless it is double, fp32's precision will do whatever A is.
template <class T, class A>
AIGC_INLINE Sines<A> sines(Vec<A> u) {
  if constexpr (std::is_same_v<T, double>) {
    return sines_of_any<A>(u, -1);
  } else {
    constexpr A most = kLargeSine;
    if (__builtin_expect(lane_bits<A>(abs<A>(u) > most) != 0, 0)) return sines_of_any<A>(u, most);
    return sines_of_small<A>(u);
  }
}

}  // namespace aigc_fast

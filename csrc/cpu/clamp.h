// Clamping to [-limit, limit], which a call may leave out.
#pragma once

#include <limits>
#include <optional>

#include <aigc_fast/vec_math.h>

namespace aigc_fast {

template <class A>
A limit_of(const std::optional<double>& clamp) {
  return clamp ? A(*clamp) : std::numeric_limits<A>::infinity();
}

template <class A>
AIGC_INLINE Vec<A> clamp_to(Vec<A> x, A limit) {
  return max<A>(min<A>(x, broadcast(limit)), broadcast(-limit));
}

}  // namespace aigc_fast

// Mean and variance of a row in one look at it.
#pragma once

#include <algorithm>

#include "two_vectors.h"

namespace aigc_fast {

// The mean is near + rest; `sums` are those over the row of d, of d * d, and what f(d, vectors,
// sums) adds to the others, d being the difference from `near`.
template <class A, int N>
struct RowMoments {
  A near, rest, variance;
  std::array<A, N + 2> sums;
};

// Differences from the mean of the first elements serve as well as those from the mean itself: what
// is left over is subtracted, and lies within the deviation, so that at most half of the sum of
// squares cancels. Where it does not (rows that begin unlike the rest), the row is looked at again,
// from its mean. With `centred` false the mean is 0. x, params: as in sum_row; x[0] is the row.
template <class T, bool centred, int N, int X, int P = 0, class F>
AIGC_INLINE RowMoments<Acc<T>, N> row_moments(std::array<const T*, X> x, int64_t width, F&& f,
                                              std::array<const Acc<T>*, P> params = {}) {
  using A = Acc<T>;
  A near = 0;
  if constexpr (centred) {
    const int64_t few = std::min<int64_t>(width, 64);  // of a short row the mean itself
    near = sum_row<T, 1, 1>(few, {x[0]}, 0, [](auto& v, Vec<A>* s) { s[0] += v[0]; })[0] / few;
  }
  for (bool again = false;; again = true) {
    // Past the end of the row everything is `near`: no difference, and f must add nothing for it.
    const auto sums = sum_row<T, N + 2, X, P>(
        width, x, near,
        [&](auto& v, Vec<A>* s) {
          const Vec<A> d = centred ? v[0] - near : v[0];
          if constexpr (centred) s[0] += d;
          s[1] += d * d;
          f(d, v, s + 2);
        },
        params);
    const A rest = sums[0] / width, variance = sums[1] / width - rest * rest;
    if (again || !(rest * rest > variance)) return {near, rest, variance, sums};
    near += rest;
  }
}

}  // namespace aigc_fast

// Sums along a row.
#pragma once

#include <array>

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

}  // namespace aigc_fast

// Tensors as rows of their last dimension, and sums along a row.
#pragma once

#include <array>

#include "tensor.h"

namespace aigc_fast {

// `count` rows of `width` elements, each one after the other in memory, `stride` elements apart.
struct Rows {
  Tensor tensor;
  int64_t count, width, stride;

  template <class T>
  const T* at(int64_t row) const {
    return data<T>(tensor) + row * stride;
  }
};

// Rows that lie one stride apart, such as halves of a packed tensor, are taken where they are;
// any other tensor that is not contiguous is copied once.
inline Rows as_rows(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t last = x.dim() - 1, width = sizes[last], count = width ? x.numel() / width : 0;
  if (x.is_contiguous()) return {x, count, width, width};
  bool in_place = width == 1 || strides[last] == 1;
  int64_t stride = width, expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (expected < 0) stride = expected = strides[d];
    in_place = in_place && strides[d] == expected;
    expected *= sizes[d];
  }
  if (in_place) return {x, count, width, stride};
  return {torch::stable::contiguous(x), count, width, width};
}

// A new contiguous tensor of the shape and dtype of x.
inline Tensor empty_like_rows(const Tensor& x) {
  if (x.is_contiguous()) return empty_like_dense(x);
  const auto sizes = x.sizes();
  return empty({sizes.begin(), sizes.end()}, x.scalar_type());
}

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

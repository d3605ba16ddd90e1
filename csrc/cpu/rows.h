// Tensors as rows of their last dimension.
#pragma once

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
  const auto sizes = x.sizes();
  const int64_t last = sizes.size() - 1, width = sizes[last], count = width ? x.numel() / width : 0;
  if (x.is_contiguous()) return {x, count, width, width};
  const auto strides = x.strides();
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
  return x.is_contiguous() ? empty_like_dense(x) : empty_contiguous_like(x);
}

}  // namespace aigc_fast

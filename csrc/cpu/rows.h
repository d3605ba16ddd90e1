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

// x, or a copy of it whose last dimension is contiguous.
inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// A tensor (batch, seq, head, head_dim) with dense rows, by their strides.
template <class T>
struct HeadRows {
  const T* data;
  int64_t batch, seq, head;

  HeadRows(const T* rows, int64_t batch, int64_t seq, int64_t head)
      : data(rows), batch(batch), seq(seq), head(head) {}
  explicit HeadRows(const Tensor& x)
      : data(aigc_fast::data<T>(x)), batch(x.stride(0)), seq(x.stride(1)), head(x.stride(2)) {}
  // The first head of a token.
  const T* at(int64_t b, int64_t token) const { return data + b * batch + token * seq; }
};

}  // namespace aigc_fast

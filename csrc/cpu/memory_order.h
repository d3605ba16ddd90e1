// The two memory orders of (batch, channels, positions): contiguous, and channels_last.
#pragma once

#include "tensor.h"

namespace aigc_fast {

inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous() || x.dim() < 4 || x.dim() > 5) return false;
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; expected *= x.size(d--))
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
  return x.size(0) == 1 || x.stride(0) == expected;
}

// A new tensor of x's shape, contiguous or channels_last.
inline Tensor empty_in_order(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes();
  if (!channels_last) return empty_contiguous_like(x);
  std::vector<int64_t> strides(x.dim());
  int64_t stride = strides[1] = 1;
  stride *= sizes[1];
  for (int64_t d = x.dim() - 1; d >= 2; stride *= sizes[d--]) strides[d] = stride;
  strides[0] = stride;
  return empty_strided(sizes, strides, x.scalar_type());
}

}  // namespace aigc_fast

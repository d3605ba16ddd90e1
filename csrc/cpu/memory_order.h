// The two memory orders of (batch, channels, positions): contiguous, and channels_last.
#pragma once

#include "tensor.h"

namespace aigc_fast {

// Whether the channels of a sample's position, and then the positions, are neighbours in memory.
inline bool is_channels_innermost(const Tensor& x) {
  if (x.is_contiguous() || x.dim() < 3) return false;
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; expected *= x.size(d--))
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
  return x.size(0) == 1 || x.stride(0) == expected;
}

// The same of what torch calls by that name: images and videos.
inline bool is_channels_last(const Tensor& x) {
  return (x.dim() == 4 || x.dim() == 5) && is_channels_innermost(x);
}

// x as it is where it lies in one of the two, else contiguous.
inline Tensor in_memory_order(const Tensor& x) {
  return is_channels_last(x) ? x : as_contiguous(x);
}

// Elements of a channel of a sample.
inline int64_t positions_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  return positions;
}

inline Tensor empty_in_order(const std::vector<int64_t>& sizes, ScalarType dtype,
                             bool channels_last) {
  if (!channels_last) return empty(sizes, dtype);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = sizes[1];
  strides[1] = 1;
  for (size_t d = sizes.size() - 1; d >= 2; stride *= sizes[d--]) strides[d] = stride;
  strides[0] = stride;
  return empty_strided(sizes, strides, dtype);
}
inline Tensor empty_in_order(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes();
  return empty_in_order({sizes.begin(), sizes.end()}, x.scalar_type(), channels_last);
}

}  // namespace aigc_fast

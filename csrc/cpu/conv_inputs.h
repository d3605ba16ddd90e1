// The images that a convolution reads.
#pragma once

#include "conv_finish.h"
#include "memory_order.h"

namespace aigc_fast {

struct ConvShape {
  int64_t batch, height, width, in, out;
};

// One of the inputs that are read as if they were one, channel after channel.
template <class T>
struct ConvInput {
  const T* data;
  int64_t channels, batch_stride, channel_stride, row_stride, pixel_stride;
};

// A block of positions at a time, x with the channels of each side by side.
template <class T>
Tensor channels_innermost(const Tensor& x) {
  if (x.size(1) == 1 || x.stride(1) == 1) return x;
  Tensor y = empty_in_order(x, true);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  if (x.stride(3) != 1 || x.numel() == 0) return torch::stable::copy_(y, x), y;
  // Planes without gaps are one row.
  const bool plane = x.stride(2) == width;
  const int64_t rows = plane ? 1 : height, size = plane ? height * width : width;
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  in_parallel(x.size(0) * rows * blocks, kBlock * channels, [&](int64_t i) {
    const int64_t n = i / (rows * blocks), row = i / blocks % rows, at = i % blocks * kBlock;
    copy_transposed(data<T>(x) + n * x.stride(0) + row * x.stride(2) + at, x.stride(1),
                    std::min(kBlock, size - at), channels,
                    mutable_data<T>(y) + ((n * rows + row) * size + at) * channels, channels);
  });
  return y;
}

template <class T>
std::vector<Tensor> all_channels_innermost(const std::vector<Tensor>& xs) {
  std::vector<Tensor> result;
  for (const Tensor& x : xs) result.push_back(channels_innermost<T>(x));
  return result;
}

template <class T>
ConvInput<T> input_of(const Tensor& x) {
  const int64_t channel_stride = x.size(1) == 1 ? 1 : x.stride(1);
  return {data<T>(x), x.size(1), x.stride(0), channel_stride, x.stride(2), x.stride(3)};
}

// A weight (., ., kernel, kernel) with its taps a fixed stride apart.
inline Tensor with_taps(const Tensor& weight, int64_t kernel) {
  require(weight.dim() == 4 && weight.size(2) == kernel && weight.size(3) == kernel,
          "weight must have shape (out, in, ", kernel, ", ", kernel, ")");
  return weight.stride(2) == kernel * weight.stride(3) ? weight : as_contiguous(weight);
}

}  // namespace aigc_fast

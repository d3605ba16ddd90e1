// The sequences that a convolution along time reads.
#pragma once

#include "conv_finish.h"

namespace aigc_fast {

// x as it lies; strides of batch, channel and time.
template <class T>
struct SequenceInput {
  const T* data;
  int64_t batch_stride, channel_stride, time_stride;
  Acc<T> slope;

  // leaky_relu of the channels of `count` steps from t on, which all exist, into to[step][depth].
  template <class S>
  void read(int64_t n, int64_t t, int64_t count, int64_t channels, S* to, int64_t depth) const {
    const T* from = data + n * batch_stride + t * time_stride;
    if (channel_stride == 1 && time_stride == depth && channels == depth)
      return bend(from, count * depth, to);
    if (channel_stride == 1) {
      for (int64_t i = 0; i < count; ++i) bend(from + i * time_stride, channels, to + i * depth);
      return;
    }
    if (time_stride == 1)
      copy_transposed(from, channel_stride, count, channels, to, depth);
    else
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < channels; ++c)
          copy_one(to + i * depth + c, from + c * channel_stride + i * time_stride);
    if (slope != 1)
      for (int64_t i = 0; i < count; ++i) bend(to + i * depth, channels, to + i * depth);
  }

 private:
  template <class From, class S>
  AIGC_INLINE void bend(const From* from, int64_t n, S* to) const {
    using A = Acc<T>;
    if (slope == 1) return copy_channels(to, from, n);
    const A below = slope;
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) {
      const Vec<A> v = load(from + i);
      store(to + i, v > 0 ? v : v * below);
    }
    if (i == n) return;
    const Vec<A> v = load_n(from + i, n - i);
    store_n(to + i, v > 0 ? v : v * below, n - i);
  }
};

template <class T>
SequenceInput<T> sequence_of(const Tensor& x, double slope) {
  const int64_t channel_stride = x.size(1) == 1 ? 1 : x.stride(1);
  return {data<T>(x), x.stride(0), channel_stride, x.stride(2), static_cast<Acc<T>>(slope)};
}

}  // namespace aigc_fast

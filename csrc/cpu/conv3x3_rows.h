// The rows of the image that a row of a 3x3 convolution reads.
//
// They lie in a scratch of their own, [pixel][channel] with a pixel of zeros on either side: no
// product then asks where the border is, and any strides, several inputs side by side, and another
// type cost one pass over each row.
#pragma once

#include "conv_inputs.h"

namespace aigc_fast {

// The last three rows of an image that were asked for, of `pixels` pixels of `depth` values.
template <class S, class T>
class ImageRows {
 public:
  ImageRows(const std::vector<ConvInput<T>>& sources, const ConvShape& s, int64_t depth,
            int64_t pixels)
      : sources_(sources), s_(s), depth_(depth), size_((pixels + 2) * depth), memory_(3 * size_) {}

  // The rows above, at, and below row y of image n; rows are to be asked for in order.
  std::array<const S*, 3> around(int64_t n, int64_t y) {
    const bool next = n == image_ && y == row_ + 1;
    if (!next) fill(n, y - 1), fill(n, y);
    fill(n, y + 1);
    image_ = n, row_ = y;
    return {slot(y - 1), slot(y), slot(y + 1)};
  }

 private:
  S* slot(int64_t y) { return memory_.data() + (y + 3) % 3 * size_; }

  // The zeros beside the image and in unused channels are there from the start.
  void fill(int64_t n, int64_t y) {
    S* to = slot(y);
    if (y < 0 || y >= s_.height)
      return std::memset(static_cast<void*>(to), 0, size_ * sizeof(S)), void();
    to += depth_;
    for (const ConvInput<T>& source : sources_) {
      const T* from = source.data + n * source.batch_stride + y * source.row_stride;
      if (source.channel_stride == 1 && source.pixel_stride == depth_ &&
          source.channels == depth_) {
        copy_channels(to, from,
                      s_.width * depth_);  // a call for each pixel would take as long again
      } else if (source.channel_stride == 1) {
        for (int64_t x = 0; x < s_.width; ++x)
          copy_channels(to + x * depth_, from + x * source.pixel_stride, source.channels);
      } else if (source.pixel_stride == 1) {
        copy_transposed(from, source.channel_stride, s_.width, source.channels, to, depth_);
      } else {
        for (int64_t c = 0; c < source.channels; ++c)
          for (int64_t x = 0; x < s_.width; ++x)
            copy_one(to + x * depth_ + c,
                     from + c * source.channel_stride + x * source.pixel_stride);
      }
      to += source.channels;
    }
  }

  const std::vector<ConvInput<T>>& sources_;
  const ConvShape s_;
  const int64_t depth_, size_;
  std::vector<S> memory_;
  int64_t image_ = -1, row_ = -1;
};

}  // namespace aigc_fast

// Winograd's F(2x2, 3x3): sixteen products in place of 36 for four neighbouring outputs of a 3x3
// convolution.
//
//   y = A' [ (G w G') * (B' x B) ] A      Lavin and Gray, arXiv:1509.09308
//
// x is a tile of 4x4 inputs and y of 2x2 outputs; * multiplies each of the sixteen positions by
// itself, and summed over channels that is a matrix product for each position. A tile with an
// infinity or a NaN makes four outputs NaN.
#pragma once

#include "conv3x3_rows.h"

namespace aigc_fast {

constexpr int64_t kPositions = 16;

// Fewer inputs are not worth the passes before and after, nor a tile of which half is unused.
// Against products of bf16, which are twice as many a cycle, it pays while there are few pixels:
// weights, which it packs in less time, take most of the time then.
template <class Products>
bool winograd_pays(const ConvShape& s) {
  if (!Products::kVectors || s.in < 16 || s.height < 2 || s.width < 2) return false;
  return sizeof(typename Products::S) > 2 || s.batch * s.height * s.width <= 256;
}

// ---- what is done to rows, and to columns -----------------------------------------------------

struct InputPass {  // B' x
  static constexpr int kFrom = 4, kTo = 4;
  template <class V>
  AIGC_INLINE static void apply(const V (&x)[4], V (&to)[4]) {
    to[0] = x[0] - x[2];
    to[1] = x[1] + x[2];
    to[2] = x[2] - x[1];
    to[3] = x[1] - x[3];
  }
};

struct WeightPass {  // G w
  static constexpr int kFrom = 3, kTo = 4;
  template <class V>
  AIGC_INLINE static void apply(const V (&w)[3], V (&to)[4]) {
    const V outer = w[0] + w[2];
    to[0] = w[0];
    to[1] = (outer + w[1]) * 0.5f;
    to[2] = (outer - w[1]) * 0.5f;
    to[3] = w[2];
  }
};

struct OutputPass {  // A' m
  static constexpr int kFrom = 4, kTo = 2;
  template <class V>
  AIGC_INLINE static void apply(const V (&m)[4], V (&to)[2]) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] - m[3];
  }
};

struct GradOutputPass {  // A y
  static constexpr int kFrom = 2, kTo = 4;
  template <class V>
  AIGC_INLINE static void apply(const V (&y)[2], V (&to)[4]) {
    to[0] = y[0];
    to[1] = y[0] + y[1];
    to[2] = y[0] - y[1];
    to[3] = -y[1];
  }
};

struct GradWeightPass {  // G' u
  static constexpr int kFrom = 4, kTo = 3;
  template <class V>
  AIGC_INLINE static void apply(const V (&u)[4], V (&to)[3]) {
    const V outer = (u[1] + u[2]) * 0.5f;
    to[0] = u[0] + outer;
    to[1] = (u[1] - u[2]) * 0.5f;
    to[2] = outer + u[3];
  }
};

// Columns, then rows, of vectors of channels: get(row, column) to put(row, column, vector).
template <class Pass, class A, class Get, class Put>
AIGC_INLINE void both_ways(Get&& get, Put&& put) {
  constexpr int kFrom = Pass::kFrom, kTo = Pass::kTo;
  Vec<A> from[kFrom], half[kFrom][kTo], to[kTo];
#pragma GCC unroll 4
  for (int x = 0; x < kFrom; ++x) {
#pragma GCC unroll 4
    for (int y = 0; y < kFrom; ++y) from[y] = get(y, x);
    Pass::apply(from, half[x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < kTo; ++y) {
#pragma GCC unroll 4
    for (int x = 0; x < kFrom; ++x) from[x] = half[x][y];
    Pass::apply(from, to);
#pragma GCC unroll 4
    for (int x = 0; x < kTo; ++x) put(y, x, to[x]);
  }
}

// ---- tiles of images --------------------------------------------------------------------------

// Where 2x2 outputs begin.
struct TilePlace {
  int64_t image, row, column;
};

class WinogradTiles {
 public:
  explicit WinogradTiles(const ConvShape& s)
      : across_((s.width + 1) / 2), down_((s.height + 1) / 2), count_(s.batch * across_ * down_) {}

  int64_t count() const { return count_; }
  TilePlace at(int64_t tile) const {
    const int64_t inside = tile % (across_ * down_);
    return {tile / (across_ * down_), inside / across_ * 2, inside % across_ * 2};
  }

 private:
  const int64_t across_, down_, count_;
};

// The pixels from `offset` of a tile on, of which there are kSize x kSize, after a pass: vectors of
// channels to [position][channel], positions `plane` apart. Pixels outside the image are zero.
template <class Pass, class T>
void transform_pixels(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
                      const TilePlace& tile, int64_t offset, const T* zeros, Acc<T>* to,
                      int64_t plane) {
  using A = Acc<T>;
  constexpr int kSize = Pass::kFrom;
  for (const ConvInput<T>& source : sources) {
    const T* pixels[kSize][kSize];
    for (int y = 0; y < kSize; ++y)
      for (int x = 0; x < kSize; ++x) {
        const int64_t row = tile.row + offset + y, column = tile.column + offset + x;
        const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
        pixels[y][x] = inside ? source.data + tile.image * source.batch_stride +
                                    row * source.row_stride + column * source.pixel_stride
                              : zeros;
      }
    for_vectors<A>(source.channels, [&](int64_t c, auto lanes) {
      both_ways<Pass, A>(
          [&](int y, int x) { return load(pixels[y][x] + c, lanes); },
          [&](int y, int x, Vec<A> v) { store(to + (4 * y + x) * plane + c, v, lanes); });
    });
    to += source.channels;
  }
}

// As many zeros as a source has channels.
template <class T>
std::vector<T> no_pixel(const std::vector<ConvInput<T>>& sources) {
  int64_t channels = 0;
  for (const ConvInput<T>& source : sources) channels = std::max(channels, source.channels);
  return std::vector<T>(channels);
}

}  // namespace aigc_fast

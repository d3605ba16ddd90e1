// Convolutions as tiles of Winograd's.
//
// A convolution of 4x4 weights with stride 2 is four of 2x2 weights, of every second row and column
// of x each, and their sum: four times the inputs. The transposed convolution with stride 2 has
// every second row and column of y from 2x2 weights of its own: four times the outputs.
#pragma once

#include "conv_inputs.h"
#include "winograd_points.h"

namespace aigc_fast {

// In one direction, for each of kPhases: a tile at t reads inputs kStepIn * t + in_offset(phase) +
// kStepIn * 0, 1, ..., one a point, and makes outputs kStepOut * t + out_offset(phase) + kStepOut *
// 0, 1, ..., by the weights tap(phase, 0), ... Phases whose outputs are the same are added.
struct Conv3x3 {
  using Down = FourPoints;
  using Across = FourPoints;
  static constexpr int kKernel = 3, kPhases = 1, kStepIn = 1, kStepOut = 1;
  static constexpr int in_offset(int) { return -1; }
  static constexpr int out_offset(int) { return 0; }
  static constexpr int tap(int, int a) { return a; }
  static constexpr int64_t length(int64_t in) { return in; }
};

struct StridedConv4x4 {  // y[t] = sum over k of x[2 t - 1 + k] w[k]
  using Down = ThreePoints;
  using Across = FivePoints;
  static constexpr int kKernel = 4, kPhases = 2, kStepIn = 2, kStepOut = 1;
  static constexpr int in_offset(int phase) { return phase - 1; }
  static constexpr int out_offset(int) { return 0; }
  static constexpr int tap(int phase, int a) { return 2 * a + phase; }
  static constexpr int64_t length(int64_t in) { return in / 2; }
};

struct TransposedConv4x4 {  // y[2 t - 1 + k] += x[t] w[k]
  using Down = ThreePoints;
  using Across = FivePoints;
  static constexpr int kKernel = 4, kPhases = 2, kStepIn = 1, kStepOut = 2;
  static constexpr int in_offset(int phase) { return phase - 1; }
  static constexpr int out_offset(int phase) { return phase; }
  static constexpr int tap(int phase, int a) { return 3 - phase - 2 * a; }
  static constexpr int64_t length(int64_t in) { return 2 * in; }
};

// Products of a tile, and its phases in both directions.
template <class Kind>
constexpr int64_t kPositions = Kind::Down::kPoints * Kind::Across::kPoints;
template <class Kind>
constexpr int kPhases = Kind::kPhases * Kind::kPhases;

// Sizes of x, and its channels and those of y; those of y itself come from the kind.
template <class Kind>
class WinogradTiles {
 public:
  explicit WinogradTiles(const ConvShape& s)
      : height(Kind::length(s.height)),
        width(Kind::length(s.width)),
        down_(tiles<typename Kind::Down>(height)),
        across_(tiles<typename Kind::Across>(width)),
        count_(s.batch * across_ * down_) {}

  const int64_t height, width;  // of y

  int64_t count() const { return count_; }

  struct Place {
    int64_t image, row, column;
  };
  Place at(int64_t tile) const {
    const int64_t inside = tile % (across_ * down_);
    return {tile / (across_ * down_), inside / across_ * Kind::Down::kOutputs,
            inside % across_ * Kind::Across::kOutputs};
  }

 private:
  template <class Points>
  static int64_t tiles(int64_t length) {
    constexpr int64_t kEach = Kind::kStepOut * Points::kOutputs;
    return (length + kEach - 1) / kEach;
  }

  const int64_t down_, across_, count_;
};

// Pixels of an image `step` apart, from (row, column) on, after a pass: vectors of channels to
// [position][channel], positions `plane` apart. Pixels outside the image are zero.
template <class Down, class Across, class T>
void transform_pixels(const std::vector<ConvInput<T>>& sources, int64_t height, int64_t width,
                      int64_t image, int64_t row, int64_t column, int64_t step, const T* zeros,
                      Acc<T>* to, int64_t plane) {
  using A = Acc<T>;
  for (const ConvInput<T>& source : sources) {
    const T* pixels[Down::kFrom][Across::kFrom];
    for (int i = 0; i < Down::kFrom; ++i)
      for (int j = 0; j < Across::kFrom; ++j) {
        const int64_t y = row + step * i, x = column + step * j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixels[i][j] = inside ? source.data + image * source.batch_stride + y * source.row_stride +
                                    x * source.pixel_stride
                              : zeros;
      }
    for_vectors<A>(source.channels, [&](int64_t c, auto lanes) {
      both_ways<Down, Across, A>(
          [&](int i, int j) { return load(pixels[i][j] + c, lanes); },
          [&](int i, int j, Vec<A> v) { store(to + (Across::kTo * i + j) * plane + c, v, lanes); });
    });
    to += source.channels;
  }
}

// The tile's inputs of every phase, [position][phase][channel].
template <class Kind, class T>
void transform_tile(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
                    const typename WinogradTiles<Kind>::Place& tile, const T* zeros, Acc<T>* to,
                    int64_t plane) {
  for (int y = 0; y < Kind::kPhases; ++y)
    for (int x = 0; x < Kind::kPhases; ++x, to += s.in)
      transform_pixels<typename Kind::Down::Input, typename Kind::Across::Input>(
          sources, s.height, s.width, tile.image, Kind::kStepIn * tile.row + Kind::in_offset(y),
          Kind::kStepIn * tile.column + Kind::in_offset(x), Kind::kStepIn, zeros, to, plane);
}

// As many zeros as a source has channels.
template <class T>
std::vector<T> no_pixel(const std::vector<ConvInput<T>>& sources) {
  int64_t channels = 0;
  for (const ConvInput<T>& source : sources) channels = std::max(channels, source.channels);
  return std::vector<T>(channels);
}

}  // namespace aigc_fast

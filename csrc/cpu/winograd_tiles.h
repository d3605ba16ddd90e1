// Winograd's minimal filtering: sixteen products for a tile of 4x4 inputs, in place of 36.
//
//   y = A' [ (G w G') * (B' x B) ] A      Lavin and Gray, arXiv:1509.09308
//
// x is the tile, y its 2x2 outputs by 3x3 weights or its 3x3 outputs by 2x2 weights; * multiplies
// each of the sixteen positions by itself, and summed over channels that is a matrix product for
// each position. An infinity makes NaN.
//
// A convolution of 4x4 weights with stride 2 is four of 2x2 weights, of every second row and column
// of x each, and their sum: four times the inputs. The transposed convolution with stride 2 has
// every second row and column of y from 2x2 weights of its own: four times the outputs.
#pragma once

#include "conv_inputs.h"

namespace aigc_fast {

constexpr int64_t kPositions = 16;

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

template <int kTaps>
struct WeightPass {  // G w
  static constexpr int kFrom = kTaps, kTo = 4;
  template <class V>
  AIGC_INLINE static void apply(const V (&w)[kTaps], V (&to)[4]) {
    V even = w[0], odd = w[1];
    if constexpr (kTaps == 3) even += w[2];
    to[0] = w[0];
    to[1] = (even + odd) * 0.5f;
    to[2] = (even - odd) * 0.5f;
    to[3] = w[kTaps - 1];
  }
};

template <int kOutputs>
struct OutputPass {  // A' m
  static constexpr int kFrom = 4, kTo = kOutputs;
  template <class V>
  AIGC_INLINE static void apply(const V (&m)[4], V (&to)[kOutputs]) {
    const V even = m[1] + m[2], odd = m[1] - m[2];
    to[0] = m[0] + even;
    if constexpr (kOutputs == 2) {
      to[1] = odd - m[3];
    } else {
      to[1] = odd;
      to[2] = even - m[3];
    }
  }
};

template <int kOutputs>
struct GradOutputPass {  // A y
  static constexpr int kFrom = kOutputs, kTo = 4;
  template <class V>
  AIGC_INLINE static void apply(const V (&y)[kOutputs], V (&to)[4]) {
    V even = y[0], odd = y[1];
    if constexpr (kOutputs == 3) even += y[2];
    to[0] = y[0];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = -y[kOutputs - 1];
  }
};

template <int kTaps>
struct GradWeightPass {  // G' u
  static constexpr int kFrom = 4, kTo = kTaps;
  template <class V>
  AIGC_INLINE static void apply(const V (&u)[4], V (&to)[kTaps]) {
    const V even = (u[1] + u[2]) * 0.5f, odd = (u[1] - u[2]) * 0.5f;
    to[0] = u[0] + even;
    if constexpr (kTaps == 2) {
      to[1] = odd + u[3];
    } else {
      to[1] = odd;
      to[2] = even + u[3];
    }
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

// ---- kinds of convolutions --------------------------------------------------------------------

// In one direction: a tile at t reads inputs kStepIn * t + in_offset(phase) + kStepIn * 0, 1, 2, 3
// for each of kInPhases, and makes kOutputs outputs kStepOut * t + out_offset(phase), ... for each
// of kOutPhases, by the kTaps weights tap(phase, 0), ...
struct Conv3x3 {
  static constexpr int kKernel = 3, kTaps = 3, kOutputs = 2;
  static constexpr int kInPhases = 1, kOutPhases = 1, kStepIn = 1, kStepOut = 1;
  static constexpr int in_offset(int) { return -1; }
  static constexpr int out_offset(int) { return 0; }
  static constexpr int tap(int, int a) { return a; }
  static constexpr int64_t length(int64_t in) { return in; }
};

struct StridedConv4x4 {  // y[t] = sum over k of x[2 t - 1 + k] w[k]
  static constexpr int kKernel = 4, kTaps = 2, kOutputs = 3;
  static constexpr int kInPhases = 2, kOutPhases = 1, kStepIn = 2, kStepOut = 1;
  static constexpr int in_offset(int phase) { return phase - 1; }
  static constexpr int out_offset(int) { return 0; }
  static constexpr int tap(int phase, int a) { return 2 * a + phase; }
  static constexpr int64_t length(int64_t in) { return in / 2; }
};

struct TransposedConv4x4 {  // y[2 t - 1 + k] += x[t] w[k]
  static constexpr int kKernel = 4, kTaps = 2, kOutputs = 3;
  static constexpr int kInPhases = 1, kOutPhases = 2, kStepIn = 1, kStepOut = 2;
  static constexpr int in_offset(int) { return -1; }
  static constexpr int out_offset(int phase) { return -phase; }
  static constexpr int tap(int phase, int a) { return 3 - phase - 2 * a; }
  static constexpr int64_t length(int64_t in) { return 2 * in; }
};

// ---- tiles of images --------------------------------------------------------------------------

// Sizes of x, and its channels and those of y; those of y itself come from the kind.
template <class Kind>
class WinogradTiles {
 public:
  explicit WinogradTiles(const ConvShape& s)
      : height(Kind::length(s.height)),
        width(Kind::length(s.width)),
        down_(tiles(height)),
        across_(tiles(width)),
        count_(s.batch * across_ * down_) {}

  const int64_t height, width;  // of y

  int64_t count() const { return count_; }

  struct Place {
    int64_t image, row, column;
  };
  Place at(int64_t tile) const {
    const int64_t inside = tile % (across_ * down_);
    return {tile / (across_ * down_), inside / across_ * Kind::kOutputs,
            inside % across_ * Kind::kOutputs};
  }

 private:
  // The last of n must reach output length - 1.
  static int64_t tiles(int64_t length) {
    constexpr int64_t kEach = Kind::kStepOut * Kind::kOutputs;
    return (length + Kind::kOutPhases - 1 + kEach - 1) / kEach;
  }

  const int64_t down_, across_, count_;
};

// Pixels of an image `step` apart, from (row, column) on, after a pass: vectors of channels to
// [position][channel], positions `plane` apart. Pixels outside the image are zero.
template <class Pass, class T>
void transform_pixels(const std::vector<ConvInput<T>>& sources, int64_t height, int64_t width,
                      int64_t image, int64_t row, int64_t column, int64_t step, const T* zeros,
                      Acc<T>* to, int64_t plane) {
  using A = Acc<T>;
  constexpr int kSize = Pass::kFrom;
  for (const ConvInput<T>& source : sources) {
    const T* pixels[kSize][kSize];
    for (int i = 0; i < kSize; ++i)
      for (int j = 0; j < kSize; ++j) {
        const int64_t y = row + step * i, x = column + step * j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixels[i][j] = inside ? source.data + image * source.batch_stride + y * source.row_stride +
                                    x * source.pixel_stride
                              : zeros;
      }
    for_vectors<A>(source.channels, [&](int64_t c, auto lanes) {
      both_ways<Pass, A>(
          [&](int i, int j) { return load(pixels[i][j] + c, lanes); },
          [&](int i, int j, Vec<A> v) { store(to + (4 * i + j) * plane + c, v, lanes); });
    });
    to += source.channels;
  }
}

// The tile's inputs of every phase, [position][phase][channel].
template <class Kind, class T>
void transform_tile(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
                    const typename WinogradTiles<Kind>::Place& tile, const T* zeros, Acc<T>* to,
                    int64_t plane) {
  for (int y = 0; y < Kind::kInPhases; ++y)
    for (int x = 0; x < Kind::kInPhases; ++x, to += s.in)
      transform_pixels<InputPass>(
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

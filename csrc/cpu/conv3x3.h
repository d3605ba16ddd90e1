// A row of a 3x3 convolution: what it reads, its products, and what becomes of their sums.
//
// The three rows of the image that a row of the result depends on lie in a scratch of their own,
// [pixel][channel] with a pixel of zeros on either side: no product then asks where the border is,
// and any strides, several inputs side by side, and another type cost one pass over each row.
#pragma once

#include <array>

#include "amx.h"
#include "tensor.h"

namespace aigc_fast {

struct ConvShape {
  int64_t batch, height, width, in, out;
};

// ---- rows of the image --------------------------------------------------------------------------

// One of the inputs that are read as if they were one, channel after channel.
template <class T>
struct Source {
  const T* data;
  int64_t channels, batch_stride, channel_stride, row_stride, pixel_stride;
};

template <class S, class T>
AIGC_INLINE void convert(S* to, const T* from, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
  } else {
    for_vectors<Acc<T>>(
        n, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
  }
}

// The last three rows of an image that were asked for, of `pixels` pixels of `depth` values.
template <class S, class T>
class Rows {
 public:
  Rows(const std::vector<Source<T>>& sources, const ConvShape& s, int64_t depth, int64_t pixels)
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
    for (const Source<T>& source : sources_) {
      const T* from = source.data + n * source.batch_stride + y * source.row_stride;
      if (source.channel_stride == 1) {
        for (int64_t x = 0; x < s_.width; ++x)
          convert(to + x * depth_, from + x * source.pixel_stride, source.channels);
      } else {
        for (int64_t c = 0; c < source.channels; ++c)
          for (int64_t x = 0; x < s_.width; ++x)
            convert_one(to + x * depth_ + c,
                        from + c * source.channel_stride + x * source.pixel_stride);
      }
      to += source.channels;
    }
  }

  static AIGC_INLINE void convert_one(S* to, const T* from) {
    if constexpr (std::is_same_v<S, T>) {
      *to = *from;
    } else {
      convert(to, from, 1);
    }
  }

  const std::vector<Source<T>>& sources_;
  const ConvShape s_;
  const int64_t depth_, size_;
  std::vector<S> memory_;
  int64_t image_ = -1, row_ = -1;
};

// ---- what becomes of the sums -------------------------------------------------------------------

// y = residual + gain * prelu(sum + bias); bias and slope are padded to whole vectors.
template <class T>
struct Finish {
  using A = Acc<T>;
  const A *bias, *slope;
  A gain;
  int64_t out;

  // The vector of channels o, o + 1, ... of a pixel; residual may be null.
  AIGC_INLINE void operator()(T* y, const T* residual, int64_t o, Vec<A> sum) const {
    const Vec<A> v = sum + load(bias + o);
    Vec<A> result = (v > 0 ? v : v * load(slope + o)) * gain;
    const int64_t n = out - o;
    if (n >= kLanes<A>) {
      if (residual) result += load(residual + o);
      store(y + o, result);
    } else if (n > 0) {
      if (residual) result += load_n(residual + o, n);
      store_n(y + o, result, n);
    }
  }
};

// ---- products by fused multiply-add -------------------------------------------------------------

// Sums of kPixels pixels and kOuts vectors of channels stay in registers.
template <class T>
class VectorProducts {
 public:
  using A = Acc<T>;
  using S = A;
  static constexpr int kOuts = 2, kPixels = kVectorBytes == 64 ? 12 : 6;
  static constexpr int64_t kGroup = kOuts * kLanes<A>;

  static int64_t depth(const ConvShape& s) { return s.in; }
  static int64_t pixels(const ConvShape& s) { return (s.width + kPixels - 1) / kPixels * kPixels; }

  // [group][tap][input][kGroup], zero beyond the last output.
  VectorProducts(const T* weight, const ConvShape& s)
      : s_(s), packed_((s.out + kGroup - 1) / kGroup * 9 * s.in * kGroup) {
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t tap = 0; tap < 9; ++tap)
          convert(packed_.data() + ((o / kGroup * 9 + tap) * s.in + c) * kGroup + o % kGroup,
                  weight + (o * s.in + c) * 9 + tap, 1);
  }

  struct Session {};

  void row(const std::array<const S*, 3>& rows, T* y, const T* residual,
           const Finish<T>& finish) const {
    for (int64_t o = 0; o < s_.out; o += kGroup)
      for (int64_t x = 0; x < s_.width; x += kPixels) {
        Vec<A> totals[kPixels][kOuts] = {};
        const A* w = packed_.data() + o * 9 * s_.in;
        for (int tap = 0; tap < 9; ++tap) {
          const S* from = rows[tap / 3] + (x + tap % 3) * s_.in;
          for (int64_t c = 0; c < s_.in; c += kChain)
            w = add(from + c, w, std::min(kChain, s_.in - c), totals);
        }
        for (int64_t p = 0; p < std::min<int64_t>(kPixels, s_.width - x); ++p)
          for (int v = 0; v < kOuts; ++v) {
            const int64_t at = (x + p) * s_.out;
            finish(y + at, residual ? residual + at : nullptr, o + v * kLanes<A>, totals[p][v]);
          }
      }
  }

 private:
  // Terms of a sum that meet before they join the others: short chains of additions round less.
  static constexpr int64_t kChain = 64;

  // Adds the products of `count` inputs; gives where the weights of the next ones lie.
  const A* add(const S* from, const A* w, int64_t count, Vec<A> (&totals)[kPixels][kOuts]) const {
    Vec<A> sums[kPixels][kOuts] = {};
    for (int64_t c = 0; c < count; ++c, w += kGroup) {
      Vec<A> weights[kOuts];
      for (int v = 0; v < kOuts; ++v) weights[v] = load(w + v * kLanes<A>);
#pragma GCC unroll 12  // else the sums stay in memory
      for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < kOuts; ++v) sums[p][v] += from[p * s_.in + c] * weights[v];
    }
    for (int p = 0; p < kPixels; ++p)
      for (int v = 0; v < kOuts; ++v) totals[p][v] += sums[p][v];
    return w;
  }

  const ConvShape s_;
  std::vector<A> packed_;
};

// ---- products in tiles --------------------------------------------------------------------------

#if AIGC_AMX

// 32 pixels by 32 outputs in four tiles, 16 where fewer are left. A tile of pixels is read where it
// lies: its rows are neighbouring pixels, so that another tap is another address.
class TileProducts {
 public:
  using S = bf16;
  static constexpr int64_t kStep = 32, kTile = 512;  // inputs of a product; values of a tile

  static int64_t depth(const ConvShape& s) { return (s.in + kStep - 1) / kStep * kStep; }
  static int64_t pixels(const ConvShape& s) { return (s.width + 15) / 16 * 16; }

  // [pair of 16 outputs][tap][step][half of the pair][input / 2][output][input % 2]
  TileProducts(const bf16* weight, const ConvShape& s)
      : s_(s), steps_(9 * depth(s) / kStep), packed_((s.out + 15) / 16 * steps_ * kTile) {
    for (int64_t o = 0; o < s.out; ++o) {
      const int64_t halves = is_pair(o / 32 * 32) ? 2 : 1;
      bf16* tiles = packed_.data() + o / 32 * 2 * steps_ * kTile + o % 32 / 16 * kTile + o % 16 * 2;
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t tap = 0; tap < 9; ++tap)
          tiles[(tap * depth(s) + c) / kStep * halves * kTile + c % kStep / 2 * 32 + c % 2] =
              weight[(o * s.in + c) * 9 + tap];
    }
  }

  using Session = Tiles;

  void row(const std::array<const S*, 3>& rows, bf16* y, const bf16* residual,
           const Finish<bf16>& finish) const {
    alignas(64) float sums[32 * 32];
    for (int64_t o = 0; o < s_.out; o += 32)
      for (int64_t x = 0; x < s_.width; x += 32) {
        const bf16* w = packed_.data() + o / 16 * steps_ * kTile;
        const int64_t n = std::min<int64_t>(32, s_.width - x);
        const auto multiply =
            n > 16 ? (is_pair(o) ? &TileProducts::multiply<2, 2> : &TileProducts::multiply<2, 1>)
                   : (is_pair(o) ? &TileProducts::multiply<1, 2> : &TileProducts::multiply<1, 1>);
        (this->*multiply)(rows, x, w, sums);
        for (int64_t p = 0; p < n; ++p) {
          const int64_t at = (x + p) * s_.out;
          for (int half = 0; half < (is_pair(o) ? 2 : 1); ++half)
            finish(y + at, residual ? residual + at : nullptr, o + 16 * half,
                   load(sums + p * 32 + 16 * half));
        }
      }
  }

 private:
  bool is_pair(int64_t o) const { return s_.out - o > 16; }

  template <int M, int N>
  AIGC_AMX_TARGET void multiply(const std::array<const S*, 3>& rows, int64_t x, const bf16* w,
                                float* sums) const {
    const int64_t d = depth(s_);
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
    for (int tap = 0; tap < 9; ++tap) {
      const bf16* from = rows[tap / 3] + (x + tap % 3) * d;
      for (int64_t c = 0; c < d; c += kStep, w += N * kTile) {
        _tile_loadd(4, from + c, d * 2);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
          _tile_loadd(7, w + kTile, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
          _tile_loadd(5, from + 16 * d + c, d * 2);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, sums, 128);
    if constexpr (N > 1) _tile_stored(1, sums + 16, 128);
    if constexpr (M > 1) _tile_stored(2, sums + 16 * 32, 128);
    if constexpr (M > 1 && N > 1) _tile_stored(3, sums + 16 * 32 + 16, 128);
  }

  const ConvShape s_;
  const int64_t steps_;
  std::vector<bf16> packed_;
};

#endif

}  // namespace aigc_fast

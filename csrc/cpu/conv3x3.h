// A row of a 3x3 convolution: its products, and what becomes of their sums.
#pragma once

#include "amx.h"
#include "conv3x3_rows.h"

namespace aigc_fast {

// ---- what becomes of the sums -------------------------------------------------------------------

// y = residual + gain * prelu(sum + bias); bias and slope are padded to whole vectors.
template <class T>
struct ConvFinish {
  using A = Acc<T>;
  const A *bias, *slope;
  A gain;
  int64_t out;

  AIGC_INLINE Vec<A> operator()(Vec<A> sum, int64_t o) const {
    const Vec<A> v = sum + load(bias + o);
    return (v > 0 ? v : v * load(slope + o)) * gain;
  }

  // Writes channels o, o + 1, ... of a pixel; residual may be null.
  AIGC_INLINE void write(T* y, const T* residual, int64_t o, Vec<A> sum) const {
    Vec<A> result = (*this)(sum, o);
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
  // Pixels * blocks that meet the same kChain inputs' weights, which then come from the first
  // cache.
  static constexpr int64_t kBlocks = 4;

  static int64_t depth(const ConvShape& s) { return s.in; }
  static int64_t pixels(const ConvShape& s) { return (s.width + kPixels - 1) / kPixels * kPixels; }

  // [group][tap][input][kGroup], zero beyond the last output.
  VectorProducts(const T* weight, const ConvShape& s)
      : s_(s), packed_((s.out + kGroup - 1) / kGroup * 9 * s.in * kGroup) {
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t tap = 0; tap < 9; ++tap)
          copy_channels(packed_.data() + ((o / kGroup * 9 + tap) * s.in + c) * kGroup + o % kGroup,
                        weight + (o * s.in + c) * 9 + tap, 1);
  }

  struct Session {};

  void row(const std::array<const S*, 3>& rows, T* y, const T* residual,
           const ConvFinish<T>& finish) const {
    for (int64_t o = 0; o < s_.out; o += kGroup)
      for (int64_t x = 0; x < s_.width; x += kBlocks * kPixels) {
        const int64_t left = std::min(kBlocks * kPixels, s_.width - x);
        Vec<A> totals[kBlocks][kPixels][kOuts] = {};
        const A* w = packed_.data() + o * 9 * s_.in;
        // The nine taps of some inputs follow one another: these then come from the first cache.
        for (int64_t c = 0; c < s_.in; c += kChain)
          for (int tap = 0; tap < 9; ++tap) {
            const S* from = rows[tap / 3] + (x + tap % 3) * s_.in + c;
            for (int64_t b = 0; b * kPixels < left; ++b)
              add_block(left - b * kPixels, from + b * kPixels * s_.in,
                        w + (tap * s_.in + c) * kGroup, std::min(kChain, s_.in - c), totals[b]);
          }
        for (int64_t p = 0; p < left; ++p)
          for (int v = 0; v < kOuts; ++v) {
            const int64_t at = (x + p) * s_.out;
            finish.write(y + at, residual ? residual + at : nullptr, o + v * kLanes<A>,
                         totals[p / kPixels][p % kPixels][v]);
          }
      }
  }

 private:
  // Terms of a sum that meet before they join the others: short chains of additions round less.
  static constexpr int64_t kChain = 64;

  // Adds the products of `count` inputs with up to kPixels pixels, of which the first `left`
  // matter.
  AIGC_INLINE void add_block(int64_t left, const S* from, const A* w, int64_t count,
                             Vec<A> (&totals)[kPixels][kOuts]) const {
    if (left > kPixels * 2 / 3) return add<kPixels>(from, w, count, totals);
    if (left > kPixels / 3) return add<kPixels * 2 / 3>(from, w, count, totals);
    add<kPixels / 3>(from, w, count, totals);
  }
  template <int P>
  void add(const S* from, const A* w, int64_t count, Vec<A> (&totals)[kPixels][kOuts]) const {
    Vec<A> sums[P][kOuts] = {};
    for (int64_t c = 0; c < count; ++c, w += kGroup) {
      Vec<A> weights[kOuts];
      for (int v = 0; v < kOuts; ++v) weights[v] = load(w + v * kLanes<A>);
#pragma GCC unroll 12  // else the sums stay in memory
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < kOuts; ++v) sums[p][v] += from[p * s_.in + c] * weights[v];
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < kOuts; ++v) totals[p][v] += sums[p][v];
  }

  const ConvShape s_;
  std::vector<A> packed_;
};

// ---- products in tiles --------------------------------------------------------------------------

#if AIGC_AMX

// 64 pixels by 16 outputs in four tiles. A tile of pixels is read where it lies: its rows are
// neighbouring pixels, so that another tap is another address. All outputs of 64 pixels follow one
// another: three rows of them stay in the first cache, the weights of 16 outputs stream through.
class TileProducts {
 public:
  using S = bf16;
  using Session = Tiles;
  static constexpr int64_t kStep = 32, kTile = 512;  // inputs of a product; values of a tile

  static int64_t depth(const ConvShape& s) { return (s.in + kStep - 1) / kStep * kStep; }
  static int64_t pixels(const ConvShape& s) { return (s.width + 15) / 16 * 16; }

  // [16 outputs][tap][step][input / 2][output][input % 2], zero beyond the last output and input
  TileProducts(const bf16* weight, const ConvShape& s)
      : s_(s), size_(9 * depth(s) * 16), packed_((s.out + 15) / 16 * size_) {
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t tap = 0; tap < 9; ++tap)
          packed_[o / 16 * size_ + (tap * depth(s) + c) / 2 * 32 + o % 16 * 2 + c % 2] =
              weight[(o * s.in + c) * 9 + tap];
  }

  void row(const std::array<const S*, 3>& rows, bf16* y, const bf16* residual,
           const ConvFinish<bf16>& finish) const {
    alignas(64) float sums[64 * 16];
    for (int64_t x = 0; x < s_.width; x += 64) {
      const int64_t n = std::min<int64_t>(64, s_.width - x);
      bf16* to = y + x * s_.out;
      const bf16* beside = residual ? residual + x * s_.out : nullptr;
      for (int64_t o = 0; o < s_.out; o += 16) {
        const bf16* w = packed_.data() + o / 16 * size_;
        if (n > 48) {
          multiply<4>(rows, x, w, sums);
        } else if (n > 32) {
          multiply<3>(rows, x, w, sums);
        } else if (n > 16) {
          multiply<2>(rows, x, w, sums);
        } else {
          multiply<1>(rows, x, w, sums);
        }
        if (s_.out - o >= 16) {
          write(sums, n, o, to, beside, finish);
        } else {
          for (int64_t p = 0; p < n; ++p)
            finish.write(to + p * s_.out, beside ? beside + p * s_.out : nullptr, o,
                         load(sums + p * 16));
        }
      }
    }
  }

 private:
  // Finishes all 16 outputs of n pixels. One instruction rounds them, which takes `store` ten.
  AIGC_AMX_TARGET void write(const float* sums, int64_t n, int64_t o, bf16* y, const bf16* residual,
                             const ConvFinish<bf16>& finish) const {
    const ConvFinish<bf16> f = finish;
    for (int64_t p = 0; p < n; ++p) {
      const int64_t at = p * s_.out + o;
      Vec<float> v = f(load(sums + p * 16), o);
      if (residual) v += load(residual + at);
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
      std::memcpy(static_cast<void*>(y + at), &rounded, sizeof rounded);
    }
  }

  // The sums of 16 * M pixels from x on, [pixel][output].
  template <int M>
  AIGC_AMX_TARGET void multiply(const std::array<const S*, 3>& rows, int64_t x, const bf16* w,
                                float* sums) const {
    const int64_t d = depth(s_), stride = d * sizeof(bf16);
    _tile_zero(0);
    if constexpr (M > 1) _tile_zero(1);
    if constexpr (M > 2) _tile_zero(2);
    if constexpr (M > 3) _tile_zero(3);
    for (int tap = 0; tap < 9; ++tap) {
      const bf16* from = rows[tap / 3] + (x + tap % 3) * d;
      for (int64_t c = 0; c < d; c += kStep, from += kStep, w += kTile) {
        _tile_loadd(7, w, 64);
        _tile_loadd(4, from, stride);
        _tile_dpbf16ps(0, 4, 7);
        if constexpr (M > 1) {
          _tile_loadd(5, from + 16 * d, stride);
          _tile_dpbf16ps(1, 5, 7);
        }
        if constexpr (M > 2) {
          _tile_loadd(6, from + 32 * d, stride);
          _tile_dpbf16ps(2, 6, 7);
        }
        if constexpr (M > 3) {
          _tile_loadd(4, from + 48 * d, stride);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
    }
    _tile_stored(0, sums, 64);
    if constexpr (M > 1) _tile_stored(1, sums + 16 * 16, 64);
    if constexpr (M > 2) _tile_stored(2, sums + 32 * 16, 64);
    if constexpr (M > 3) _tile_stored(3, sums + 48 * 16, 64);
  }

  const ConvShape s_;
  const int64_t size_;  // of the weights of 16 outputs
  std::vector<bf16> packed_;
};

#endif

}  // namespace aigc_fast

// A row of a 3x3 convolution: its products, and what becomes of their sums.
#pragma once

#include "amx.h"
#include "bf16_dot.h"
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

#if AIGC_BF16_DOT
// Finishes 16 outputs, from o on, of n pixels whose sums lie `pitch` apart. One instruction rounds
// them, which takes `store` ten.
__attribute__((target("avx512bf16"), noinline)) inline void write_pixels(
    const float* sums, int64_t pitch, int64_t n, int64_t o, bf16* y, const bf16* residual,
    const ConvFinish<bf16>& finish) {
  const ConvFinish<bf16> f = finish;
  for (int64_t p = 0; p < n; ++p) {
    const int64_t at = p * f.out + o;
    Vec<float> v = f(load(sums + p * pitch), o);
    if (residual) v += load(residual + at);
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(static_cast<void*>(y + at), &rounded, sizeof rounded);
  }
}
#endif

// ---- products in registers ----------------------------------------------------------------------

constexpr int kConvPixels = kVectorBytes == 64 ? 12 : 6, kConvOuts = 2;

// Sums of kConvPixels pixels and kConvOuts vectors of channels.
template <class A>
struct ConvSums {
  Vec<A> of[kConvPixels][kConvOuts] = {};
};

// totals += the sums of the first P pixels. Unrolled, like every loop over them: else the sums
// stay in memory.
template <int P, class A>
AIGC_INLINE void add_sums(const Vec<A> (&sums)[P][kConvOuts], ConvSums<A>& totals) {
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < kConvOuts; ++v) totals.of[p][v] += sums[p][v];
}

// By fused multiply-add, an input at a time.
template <class T>
struct MultiplyAdd {
  using A = Acc<T>;
  using S = A;
  static constexpr int64_t kStep = 1;
  // Terms of a sum that meet before they join the others: short chains of additions round less.
  static constexpr int64_t kChain = 96;

  template <int P>
  static void add(const S* from, int64_t pitch, const S* w, int64_t count, ConvSums<A>& totals) {
    Vec<A> sums[P][kConvOuts] = {};
    for (int64_t c = 0; c < count; ++c, w += kConvOuts * kLanes<A>) {
      Vec<A> weights[kConvOuts];
      for (int v = 0; v < kConvOuts; ++v) weights[v] = load(w + v * kLanes<A>);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < kConvOuts; ++v) sums[p][v] += from[p * pitch + c] * weights[v];
    }
    add_sums<P, A>(sums, totals);
  }
};

#if AIGC_BF16_DOT
// By the instruction that adds two products of bf16 at once. Subnormal numbers count as zero.
struct Bf16Dot {
  using A = float;
  using S = bf16;
  static constexpr int64_t kStep = 2, kChain = 192;

  template <int P>
  __attribute__((target("avx512bf16"), noinline)) static void add(const S* from, int64_t pitch,
                                                                  const S* w, int64_t count,
                                                                  ConvSums<A>& totals) {
    Vec<A> sums[P][kConvOuts] = {};
    for (int64_t c = 0; c < count; c += kStep, w += kStep * kConvOuts * kLanes<A>) {
      __m512i weights[kConvOuts];
      for (int v = 0; v < kConvOuts; ++v)
        weights[v] = _mm512_loadu_si512(w + v * kStep * kLanes<A>);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        int32_t pair;
        std::memcpy(&pair, from + p * pitch + c, sizeof pair);
        const __m512bh pixel = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < kConvOuts; ++v)
          sums[p][v] = (Vec<A>)_mm512_dpbf16_ps((__m512)sums[p][v], (__m512bh)weights[v], pixel);
      }
    }
    add_sums<P, A>(sums, totals);
  }
};
#endif

// How is MultiplyAdd or Bf16Dot.
template <class T, class How>
class VectorProducts {
 public:
  using A = typename How::A;
  using S = typename How::S;
  static constexpr int64_t kGroup = kConvOuts * kLanes<A>, kPixels = kConvPixels;
  // Blocks of pixels that meet the same weights, which then come from the first cache.
  static constexpr int64_t kBlocks = 4;

  static int64_t depth(const ConvShape& s) {
    return (s.in + How::kStep - 1) / How::kStep * How::kStep;
  }
  static int64_t pixels(const ConvShape& s) { return (s.width + kPixels - 1) / kPixels * kPixels; }

  // [group][tap][input / kStep][kGroup][input % kStep], zero beyond the last output and input.
  VectorProducts(const T* weight, const ConvShape& s)
      : s_(s), depth_(depth(s)), packed_((s.out + kGroup - 1) / kGroup * 9 * depth_ * kGroup) {
    constexpr int64_t step = How::kStep;
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t first = (o / kGroup * 9 + tap) * depth_ + c / step * step;
          copy_channels(packed_.data() + first * kGroup + o % kGroup * step + c % step,
                        weight + (o * s.in + c) * 9 + tap, 1);
        }
  }

  struct Session {};

  void row(const std::array<const S*, 3>& rows, T* y, const T* residual,
           const ConvFinish<T>& finish) const {
    // Three taps of one row of the image read on where the first ends: where they are short they
    // are one run.
    const bool by_rows = 3 * depth_ <= How::kChain;
    const int64_t runs = by_rows ? 3 : 9, length = by_rows ? 3 * depth_ : depth_;
    for (int64_t o = 0; o < s_.out; o += kGroup)
      for (int64_t x = 0; x < s_.width; x += kBlocks * kPixels) {
        const int64_t left = std::min(kBlocks * kPixels, s_.width - x);
        ConvSums<A> totals[kBlocks];
        const S* w = packed_.data() + o * 9 * depth_;
        // All runs of some inputs follow one another: these then come from the first cache.
        for (int64_t c = 0; c < length; c += How::kChain)
          for (int64_t run = 0; run < runs; ++run) {
            const S* from = by_rows ? rows[run] : rows[run / 3] + run % 3 * depth_;
            from += x * depth_ + c;
            for (int64_t b = 0; b * kPixels < left; ++b)
              add_block(left - b * kPixels, from + b * kPixels * depth_,
                        w + (run * length + c) * kGroup, std::min(How::kChain, length - c),
                        totals[b]);
          }
        T* to = y + x * s_.out;
        const T* beside = residual ? residual + x * s_.out : nullptr;
        const A* sums = reinterpret_cast<const A*>(totals);  // [pixel][kGroup]
        for (int64_t first = o; first < std::min(o + kGroup, s_.out);
             first += kLanes<A>, sums += kLanes<A>) {
#if AIGC_BF16_DOT
          if constexpr (std::is_same_v<How, Bf16Dot>)
            if (s_.out - first >= kLanes<A>) {
              write_pixels(sums, kGroup, left, first, to, beside, finish);
              continue;
            }
#endif
          for (int64_t p = 0; p < left; ++p)
            finish.write(to + p * s_.out, beside ? beside + p * s_.out : nullptr, first,
                         load(sums + p * kGroup));
        }
      }
  }

 private:
  // Adds the products of `count` inputs with up to kPixels pixels, of which the first `left`
  // matter.
  AIGC_INLINE void add_block(int64_t left, const S* from, const S* w, int64_t count,
                             ConvSums<A>& totals) const {
    if (left > kPixels * 2 / 3) return How::template add<kPixels>(from, depth_, w, count, totals);
    if (left > kPixels / 3)
      return How::template add<kPixels * 2 / 3>(from, depth_, w, count, totals);
    How::template add<kPixels / 3>(from, depth_, w, count, totals);
  }

  const ConvShape s_;
  const int64_t depth_;
  std::vector<S> packed_;
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
          write_pixels(sums, 16, n, o, to, beside, finish);
        } else {
          for (int64_t p = 0; p < n; ++p)
            finish.write(to + p * s_.out, beside ? beside + p * s_.out : nullptr, o,
                         load(sums + p * 16));
        }
      }
    }
  }

 private:
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

// The products of a convolution in bf16, in the tiles of the matrix unit.
#pragma once

#include "amx.h"
#include "conv_finish.h"

#if AIGC_AMX
namespace aigc_fast {

// 64 pixels by 16 outputs in four tiles. A tile of pixels is read where it lies: its rows are
// neighbouring pixels, so that another tap is another address. All outputs of 64 pixels follow one
// another: their inputs stay in the first cache, the weights of 16 outputs stream through.
class TileProducts {
 public:
  using S = bf16;
  using Session = Tiles;
  static constexpr bool kVectors = false;
  static constexpr int64_t kStep = 32, kTile = 512;  // inputs of a product; values of a tile

  static int64_t depth(int64_t in) { return round_up(in, kStep); }
  static int64_t pixels(int64_t n) { return round_up(n, 16); }

  // [16 outputs][tap][step][input / 2][output][input % 2], zero beyond the last output and input
  TileProducts(const ConvWeight<bf16>& weight, const ConvSize& size)
      : size_(size),
        depth_(depth(size.in)),
        group_(size.taps * depth_ * 16),
        packed_((size.out + 15) / 16 * group_) {
    in_parallel((size.out + 15) / 16, group_, [&](int64_t group) {
      pack_outputs<16, 2>(weight, size, group * 16, std::min<int64_t>(16, size.out - group * 16),
                          depth_, packed_.data() + group * group_);
    });
  }

  void run(const S* const* taps, int64_t pitch, int64_t width, const ConvTarget<bf16>& to,
           const ConvFinish<bf16>& finish) const {
    alignas(64) float sums[64 * 16];
    for (int64_t x = 0; x < width; x += 64) {
      const int64_t n = std::min<int64_t>(64, width - x);
      for (int64_t o = 0; o < size_.out; o += 16) {
        const bf16* w = packed_.data() + o / 16 * group_;
        if (n > 48) {
          multiply<4>(taps, x, pitch, w, sums);
        } else if (n > 32) {
          multiply<3>(taps, x, pitch, w, sums);
        } else if (n > 16) {
          multiply<2>(taps, x, pitch, w, sums);
        } else {
          multiply<1>(taps, x, pitch, w, sums);
        }
        if (size_.out - o >= 16) {
          write_rounded(finish, to.at(x), n, o, sums, 16);
        } else {
          finish.write(to.at(x), n, o, sums, 16);
        }
      }
    }
  }

 private:
  // The sums of 16 * M pixels from x on, [pixel][output].
  template <int M>
  AIGC_AMX_TARGET void multiply(const S* const* taps, int64_t x, int64_t pitch, const bf16* w,
                                float* sums) const {
    const int64_t stride = pitch * sizeof(bf16);
    _tile_zero(0);
    if constexpr (M > 1) _tile_zero(1);
    if constexpr (M > 2) _tile_zero(2);
    if constexpr (M > 3) _tile_zero(3);
    for (int64_t tap = 0; tap < size_.taps; ++tap) {
      const bf16* from = taps[tap] + x * pitch;
      for (int64_t c = 0; c < depth_; c += kStep, from += kStep, w += kTile) {
        _tile_loadd(7, w, 64);
        _tile_loadd(4, from, stride);
        _tile_dpbf16ps(0, 4, 7);
        if constexpr (M > 1) {
          _tile_loadd(5, from + 16 * pitch, stride);
          _tile_dpbf16ps(1, 5, 7);
        }
        if constexpr (M > 2) {
          _tile_loadd(6, from + 32 * pitch, stride);
          _tile_dpbf16ps(2, 6, 7);
        }
        if constexpr (M > 3) {
          _tile_loadd(4, from + 48 * pitch, stride);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
    }
    _tile_stored(0, sums, 64);
    if constexpr (M > 1) _tile_stored(1, sums + 16 * 16, 64);
    if constexpr (M > 2) _tile_stored(2, sums + 32 * 16, 64);
    if constexpr (M > 3) _tile_stored(3, sums + 48 * 16, 64);
  }

  const ConvSize size_;
  const int64_t depth_, group_;  // group_: values of the weights of 16 outputs
  KeptBuffer<bf16> packed_;
};

}  // namespace aigc_fast
#endif

// The products of a convolution, in registers.
#pragma once

#include "conv_finish.h"
#include "conv_sums.h"

namespace aigc_fast {

// By fused multiply-add, an input at a time.
template <class T>
struct MultiplyAdd {
  using A = Acc<T>;
  using S = A;
  static constexpr int64_t kStep = 1;
  // Terms of a sum that meet before they join the others: short chains of additions round less.
  static constexpr int64_t kChain = 64;

  template <int P>
  static void sum(const S* const* taps, int64_t count, int64_t pitch, int64_t at, const S* w,
                  int64_t depth, bool more, ConvSums<A>& totals) {
    Vec<A> sums[P][kConvOuts] = {};
    for (int64_t tap = 0; tap < count; ++tap) {
      const S* from = taps[tap] + at;
      for (int64_t c = 0; c < depth; ++c, w += kConvOuts * kLanes<A>) {
        Vec<A> weights[kConvOuts];
        for (int v = 0; v < kConvOuts; ++v) weights[v] = load(w + v * kLanes<A>);
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < kConvOuts; ++v) sums[p][v] += from[p * pitch + c] * weights[v];
      }
    }
    keep_sums<P, A>(sums, more, totals);
  }
};

#if AIGC_BF16_DOT
// By the instruction that adds two products of bf16 at once. Subnormal numbers count as zero.
struct Bf16Dot {
  using A = float;
  using S = bf16;
  static constexpr int64_t kStep = 2, kChain = 192;

  template <int P>
  __attribute__((target("avx512bf16"), noinline)) static void sum(const S* const* taps,
                                                                  int64_t count, int64_t pitch,
                                                                  int64_t at, const S* w,
                                                                  int64_t depth, bool more,
                                                                  ConvSums<A>& totals) {
    Vec<A> sums[P][kConvOuts] = {};
    for (int64_t tap = 0; tap < count; ++tap) {
      const S* from = taps[tap] + at;
      for (int64_t c = 0; c < depth; c += kStep, w += kStep * kConvOuts * kLanes<A>) {
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
    }
    keep_sums<P, A>(sums, more, totals);
  }
};
#endif

// How is MultiplyAdd or Bf16Dot.
template <class T, class How>
class VectorProducts {
 public:
  using A = typename How::A;
  using S = typename How::S;
  struct Session {};
  static constexpr bool kVectors = true;
  static constexpr int64_t kGroup = kConvOuts * kLanes<A>, kPixels = kConvPixels;
  // Blocks of pixels that meet the same weights, which then come from the first cache.
  static constexpr int64_t kBlocks = 4;

  // Values of a pixel, and pixels, that the scratch must have for `in` channels and `n` outputs.
  static int64_t depth(int64_t in) { return round_up(in, How::kStep); }
  static int64_t pixels(int64_t n) { return round_up(n, kPixels); }

  // [group][tap][input / kStep][kGroup][input % kStep], zero beyond the last output and input.
  VectorProducts(const ConvWeight<T>& weight, const ConvSize& size)
      : size_(size),
        depth_(depth(size.in)),
        packed_(round_up(size.out, kGroup) * size.taps * depth_) {
    in_parallel((size.out + kGroup - 1) / kGroup, size.taps * depth_ * kGroup, [&](int64_t group) {
      const int64_t first = group * kGroup, n = std::min(kGroup, size.out - first);
      pack_outputs<kGroup, How::kStep>(weight, size, first, n, depth_,
                                       packed_.data() + first * size.taps * depth_);
    });
  }

  // The products of `depth` inputs of up to kPixels pixels, of which the first `left` matter, with
  // the weights of kGroup outputs, [input][kGroup].
  static void sum_pixels(const S* from, int64_t depth, int64_t pitch, int64_t left, const S* w,
                         bool more, ConvSums<A>& totals) {
    sum_block(left, &from, 1, pitch, 0, w, depth, more, totals);
  }

  // The outputs of `width` pixels; taps has the first pixel's input of each tap, the next pixel's
  // lies `pitch` behind it.
  void run(const S* const* taps, int64_t pitch, int64_t width, const ConvTarget<T>& to,
           const ConvFinish<T>& finish) const {
    // Where pixels are short, the products of several taps make one chain.
    const int64_t together = std::max<int64_t>(1, How::kChain / depth_);
    for (int64_t o = 0; o < size_.out; o += kGroup)
      for (int64_t x = 0; x < width; x += kBlocks * kPixels) {
        const int64_t left = std::min(kBlocks * kPixels, width - x);
        ConvSums<A> totals[kBlocks];
        // Between the taps of a transposed convolution there may be outputs of no tap.
        if (size_.taps == 0) std::memset(static_cast<void*>(totals), 0, sizeof totals);
        const S* w = packed_.data() + o * size_.taps * depth_;
        // All taps of some inputs follow one another: these then come from the first cache.
        for (int64_t c = 0; c < depth_; c += How::kChain)
          for (int64_t tap = 0; tap < size_.taps; tap += together)
            for (int64_t b = 0; b * kPixels < left; ++b)
              sum_block(left - b * kPixels, taps + tap, std::min(together, size_.taps - tap), pitch,
                        (x + b * kPixels) * pitch + c, w + (tap * depth_ + c) * kGroup,
                        std::min(How::kChain, depth_ - c), c + tap > 0, totals[b]);
        const A* sums = reinterpret_cast<const A*>(totals);  // [pixel][kGroup]
        for (int64_t first = o; first < std::min(o + kGroup, size_.out);
             first += kLanes<A>, sums += kLanes<A>) {
#if AIGC_BF16_DOT
          if constexpr (std::is_same_v<How, Bf16Dot>)
            if (size_.out - first >= kLanes<A>) {
              write_rounded(finish, to.at(x), left, first, sums, kGroup);
              continue;
            }
#endif
          finish.write(to.at(x), left, first, sums, kGroup);
        }
      }
  }

 private:
  // The products of `depth` inputs of `count` taps with up to kPixels pixels, of which the first
  // `left` matter.
  AIGC_INLINE static void sum_block(int64_t left, const S* const* taps, int64_t count,
                                    int64_t pitch, int64_t at, const S* w, int64_t depth, bool more,
                                    ConvSums<A>& totals) {
    if (left > kPixels * 2 / 3)
      return How::template sum<kPixels>(taps, count, pitch, at, w, depth, more, totals);
    if (left > kPixels / 3)
      return How::template sum<kPixels * 2 / 3>(taps, count, pitch, at, w, depth, more, totals);
    How::template sum<kPixels / 3>(taps, count, pitch, at, w, depth, more, totals);
  }

  const ConvSize size_;
  const int64_t depth_;
  KeptBuffer<S> packed_;  // every element of which is written
};

// A few outputs leave most lanes of VectorProducts empty: here the lanes are inputs.
template <class T>
class DotProducts {
 public:
  using A = Acc<T>;
  using S = A;
  struct Session {};
  static constexpr bool kVectors = false;
  static constexpr int64_t kMaxOutputs = 8;

  static int64_t depth(int64_t in) { return round_up(in, kLanes<A>); }
  static int64_t pixels(int64_t n) { return n; }

  // [output][tap][input]
  DotProducts(const ConvWeight<T>& weight, const ConvSize& size)
      : size_(size), depth_(depth(size.in)), packed_(size.out * size.taps * depth_) {
    A* to = packed_.data();
    for (int64_t o = 0; o < size.out; ++o)
      for (int64_t tap = 0; tap < size.taps; ++tap, to += depth_)
        for (int64_t c = 0; c < size.in; ++c) copy_one(to + c, weight.at(o, c, tap));
  }

  void run(const S* const* taps, int64_t pitch, int64_t width, const ConvTarget<T>& to,
           const ConvFinish<T>& finish) const {
    A sums[std::max<int64_t>(kMaxOutputs, kLanes<A>)] = {};
    for (int64_t x = 0; x < width; ++x) {
      const A* w = packed_.data();
      for (int64_t o = 0; o < size_.out; ++o) {
        Vec<A> sum = {};
        for (int64_t tap = 0; tap < size_.taps; ++tap, w += depth_)
          for (int64_t c = 0; c < depth_; c += kLanes<A>)
            sum += load(taps[tap] + x * pitch + c) * load(w + c);
        sums[o] = sum_lanes<A>(sum);
      }
      for (int64_t o = 0; o < size_.out; o += kLanes<A>) finish.write(to.at(x), 1, o, sums + o, 0);
    }
  }

 private:
  const ConvSize size_;
  const int64_t depth_;
  std::vector<A> packed_;  // zero where nothing is written
};

}  // namespace aigc_fast

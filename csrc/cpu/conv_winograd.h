// Winograd's F(2x2, 3x3): sixteen products in place of 36 for four neighbouring outputs of a 3x3
// convolution.
//
//   y = A' [ (G w G') * (B' x B) ] A      Lavin and Gray, arXiv:1509.09308
//
// x is a tile of 4x4 inputs and y of 2x2 outputs; * multiplies each of the sixteen positions by
// itself, and summed over channels that is a matrix product for each position. A tile with an
// infinity or a NaN makes four outputs NaN.
#pragma once

#include "aligned_buffer.h"
#include "conv3x3_rows.h"
#include "conv_vectors.h"
#include "copy_transposed.h"

namespace aigc_fast {

constexpr int64_t kPositions = 16;

// Fewer inputs are not worth the passes before and after, nor a tile of which half is unused.
inline bool winograd_pays(const ConvShape& s) {
  return s.in >= 16 && s.height > 1 && s.width > 1;
}

// The inputs of a vertical or horizontal pass, B' x.
template <class V>
AIGC_INLINE void winograd_input(const V (&x)[4], V (&to)[4]) {
  to[0] = x[0] - x[2];
  to[1] = x[1] + x[2];
  to[2] = x[2] - x[1];
  to[3] = x[1] - x[3];
}

// G w.
template <class V>
AIGC_INLINE void winograd_weight(const V (&w)[3], V (&to)[4]) {
  const V outer = w[0] + w[2];
  to[0] = w[0];
  to[1] = (outer + w[1]) * 0.5f;
  to[2] = (outer - w[1]) * 0.5f;
  to[3] = w[2];
}

// A' m.
template <class V>
AIGC_INLINE void winograd_output(const V (&m)[4], V (&to)[2]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2] - m[3];
}

// What a thread keeps for its next convolution: new memory would cost a page fault every 4 KB.
template <class A>
struct WinogradScratch {
  AlignedBuffer<A> weight, input;
  std::vector<ConvSums<A>> sums;

  static WinogradScratch& own() {
    static thread_local WinogradScratch scratch;
    return scratch;
  }
};

template <class T>
class Winograd {
 public:
  using A = Acc<T>;
  using Products = VectorProducts<T, MultiplyAdd<T>>;
  static constexpr int64_t kGroup = Products::kGroup, kPixels = Products::kPixels;

  // `sources` have their channels innermost.
  Winograd(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
           const ConvWeight<T>& weight, const ConvFinish<T>& finish, const T* residual, T* y)
      : sources_(sources),
        s_(s),
        weight_(weight),
        finish_(finish),
        residual_(residual),
        y_(y),
        depth_(round_up(s.in, kLanes<A>)),
        across_((s.width + 1) / 2),
        down_((s.height + 1) / 2),
        tiles_(s.batch * across_ * down_),
        groups_((s.out + kGroup - 1) / kGroup) {
    int64_t channels = 0;
    for (const auto& source : sources) channels = std::max(channels, source.channels);
    zeros_.resize(channels);
  }

  void run() const {
    if (tiles_ * kPositions * depth_ * int64_t(sizeof(A)) <= kFewInputs)
      share_outputs();
    else
      share_tiles();
  }

 private:
  static constexpr int64_t kInputBytes = 448 << 10, kWeightBytes = 4 << 20, kFewInputs = 2 << 20;
  static constexpr int64_t kTiles = 4 * kPixels;  // whose sums stay in the second cache

  // Few tiles: a thread transforms all of them for itself, and weights just before their products.
  void share_outputs() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t splits = std::min(groups_, threads);
    const int64_t ranges = std::clamp<int64_t>(tiles_ / kPixels, 1, threads / splits);
    torch::stable::parallel_for(0, ranges * splits, 1, [&](int64_t begin, int64_t end) {
      auto& [weight, input, sums] = WinogradScratch<A>::own();
      weight.grow(kPositions * weight_plane());
      for (int64_t item = begin; item < end; ++item) {
        const int64_t range = item / splits, split = item % splits;
        const int64_t first = tiles_ * range / ranges, last = tiles_ * (range + 1) / ranges;
        const int64_t plane = input_plane(last - first);
        input.grow(kPositions * plane);
        transform_inputs(first, last - first, input.data(), plane);
        for (int64_t g = groups_ * split / splits; g < groups_ * (split + 1) / splits; ++g) {
          for (int64_t c = 0; c < depth_; c += kLanes<A>) transform_weights(g, c, weight.data());
          for (int64_t t = first; t < last; t += kTiles)
            multiply(g, t, std::min(kTiles, last - t), weight.data(),
                     input.data() + (t - first) * depth_, plane, sums);
        }
      }
    });
  }

  // Many tiles: weights are transformed first, as many outputs as stay in the third cache.
  void share_tiles() const {
    const int64_t most = std::clamp<int64_t>(
        kInputBytes / (kPositions * depth_ * int64_t(sizeof(A))) / kPixels * kPixels, kPixels, kTiles);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t shares = round_up((tiles_ + most - 1) / most, threads);
    const int64_t size = round_up((tiles_ + shares - 1) / shares, std::min<int64_t>(4, kPixels));
    const int64_t blocks = (tiles_ + size - 1) / size, plane = input_plane(size);

    const int64_t per_group = kPositions * weight_plane(), steps = depth_ / kLanes<A>;
    const int64_t parts = std::max<int64_t>(1, groups_ * per_group * sizeof(A) / kWeightBytes);
    const int64_t together = (groups_ + parts - 1) / parts;
    AlignedBuffer<A>& weight = WinogradScratch<A>::own().weight;
    weight.grow(together * per_group);
    for (int64_t g = 0; g < groups_; g += together) {
      const int64_t n = std::min(together, groups_ - g);
      in_parallel(n * steps, kLanes<A> * kPositions * kGroup, [&](int64_t i) {
        transform_weights(g + i / steps, i % steps * kLanes<A>,
                          weight.data() + i / steps * per_group);
      });
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        auto& [_, input, sums] = WinogradScratch<A>::own();
        input.grow(kPositions * plane);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * size, count = std::min(size, tiles_ - first);
          transform_inputs(first, count, input.data(), plane);
          for (int64_t i = 0; i < n; ++i)
            multiply(g + i, first, count, weight.data() + i * per_group, input.data(), plane, sums);
        }
      });
    }
  }

  // From one position of transformed inputs to the next: an odd number of vectors, so that the
  // sixteen lie in different sets of the cache.
  int64_t input_plane(int64_t tiles) const {
    return round_up(tiles, kPixels) * depth_ + kLanes<A>;
  }

  // The same of transformed weights.
  int64_t weight_plane() const { return (depth_ + kLanes<A>) * kGroup; }

  // G w G' of kLanes inputs from c as [position][input][kGroup], zero beyond the last output and
  // input.
  void transform_weights(int64_t group, int64_t c, A* to) const {
    alignas(64) A taps[kLanes<A> * 9 * kGroup];  // [input][tap][kGroup]
    gather_weights(group * kGroup, c, taps);
    to += c * kGroup;
    for (int64_t i = 0; i < kLanes<A>; ++i, to += kGroup)
      for (int64_t o = 0; o < kGroup; o += kLanes<A>) {
        const A* w = taps + i * 9 * kGroup + o;
        Vec<A> half[3][4], full[4];
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x)
          winograd_weight<Vec<A>>(
              {load(w + x * kGroup), load(w + (3 + x) * kGroup), load(w + (6 + x) * kGroup)},
              half[x]);
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) {
          winograd_weight<Vec<A>>({half[0][y], half[1][y], half[2][y]}, full);
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) store(to + (4 * y + x) * weight_plane() + o, full[x]);
        }
      }
  }

  // The weights of kLanes inputs from c and kGroup outputs from o as [input][tap][kGroup].
  void gather_weights(int64_t o, int64_t c, A* to) const {
    const int64_t inputs = std::min<int64_t>(kLanes<A>, s_.in - c);
    const int64_t outs = std::min(kGroup, s_.out - o);
    if (inputs < kLanes<A> || outs < kGroup) std::fill_n(to, kLanes<A> * 9 * kGroup, A(0));
    if (weight_.tap_stride == 1 && weight_.in_stride == 9) {
      copy_transposed(weight_.at(o, c, 0), weight_.out_stride, inputs * 9, outs, to, kGroup);
    } else if (weight_.in_stride == 1) {
      for (int64_t tap = 0; tap < 9; ++tap)
        copy_transposed(weight_.at(o, c, tap), weight_.out_stride, inputs, outs, to + tap * kGroup,
                        9 * kGroup);
    } else {
      for (int64_t r = 0; r < outs; ++r)
        for (int64_t i = 0; i < inputs; ++i)
          for (int64_t tap = 0; tap < 9; ++tap)
            copy_one(to + (i * 9 + tap) * kGroup + r, weight_.at(o + r, c + i, tap));
    }
  }

  void transform_inputs(int64_t first, int64_t count, A* to, int64_t plane) const {
    for (int64_t t = 0; t < count; ++t, to += depth_) {
      const int64_t n = (first + t) / (across_ * down_), at = (first + t) % (across_ * down_);
      const int64_t top = at / across_ * 2 - 1, left = at % across_ * 2 - 1;
      A* channel = to;
      for (const ConvInput<T>& source : sources_) {
        const T* pixels[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t row = top + i / 4, x = left + i % 4;
          const bool inside = row >= 0 && row < s_.height && x >= 0 && x < s_.width;
          pixels[i] = inside ? source.data + n * source.batch_stride + row * source.row_stride +
                                   x * source.pixel_stride
                             : zeros_.data();
        }
        for_vectors<A>(source.channels, [&](int64_t c, auto lanes) {
          Vec<A> half[4][4], full[4];
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x)
            winograd_input<Vec<A>>({load(pixels[x] + c, lanes), load(pixels[4 + x] + c, lanes),
                                    load(pixels[8 + x] + c, lanes), load(pixels[12 + x] + c, lanes)},
                                   half[x]);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            winograd_input<Vec<A>>({half[0][i], half[1][i], half[2][i], half[3][i]}, full);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) store(channel + (4 * i + j) * plane + c, full[j], lanes);
          }
        });
        channel += source.channels;
      }
      if (const int64_t beyond = to + depth_ - channel)
        for (int i = 0; i < kPositions; ++i) std::fill_n(channel + i * plane, beyond, A(0));
    }
  }

  // A group of outputs of `count` tiles.
  void multiply(int64_t group, int64_t first, int64_t count, const A* w, const A* input,
                int64_t plane, std::vector<ConvSums<A>>& sums) const {
    const int64_t blocks = (count + kPixels - 1) / kPixels;
    sums.resize(kPositions * kTiles / kPixels);  // [position][tile][kGroup]
    for (int64_t position = 0; position < kPositions; ++position, input += plane, w += weight_plane())
      Products::sum_pixels(input, depth_, count, w, sums.data() + position * blocks);
    transform_sums(group, first, count, reinterpret_cast<const A*>(sums.data()),
                   blocks * kPixels * kGroup);
  }

  void transform_sums(int64_t group, int64_t first, int64_t count, const A* sums,
                      int64_t plane) const {
    for (int64_t t = 0; t < count; ++t, sums += kGroup) {
      const int64_t n = (first + t) / (across_ * down_), at = (first + t) % (across_ * down_);
      const int64_t row = at / across_ * 2, x = at % across_ * 2;
      for (int64_t o = 0; o < kGroup && group * kGroup + o < s_.out; o += kLanes<A>) {
        Vec<A> half[4][2], full[2];
        A outputs[4][kLanes<A>];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          winograd_output<Vec<A>>(
              {load(sums + j * plane + o), load(sums + (4 + j) * plane + o),
               load(sums + (8 + j) * plane + o), load(sums + (12 + j) * plane + o)},
              half[j]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          winograd_output<Vec<A>>({half[0][i], half[1][i], half[2][i], half[3][i]}, full);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) store(outputs[2 * i + j], full[j]);
        }
        for (int64_t i = 0; i < 2 && row + i < s_.height; ++i) {
          const int64_t pixel = ((n * s_.height + row + i) * s_.width + x) * s_.out;
          finish_.write({y_ + pixel, s_.out, {residual_ ? residual_ + pixel : nullptr}},
                        std::min<int64_t>(2, s_.width - x), group * kGroup + o, outputs[2 * i],
                        kLanes<A>);
        }
      }
    }
  }

  const std::vector<ConvInput<T>>& sources_;
  const ConvShape s_;
  const ConvWeight<T> weight_;
  const ConvFinish<T> finish_;
  const T* residual_;
  T* y_;
  const int64_t depth_, across_, down_, tiles_, groups_;
  std::vector<T> zeros_;
};

}  // namespace aigc_fast

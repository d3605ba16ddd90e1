// Convolutions by Winograd's algorithm.
#pragma once

#include "conv_vectors.h"
#include "winograd_tiles.h"

namespace aigc_fast {

template <class Kind, class T>
class Winograd {
 public:
  using A = Acc<T>;
  using Products = VectorProducts<T, MultiplyAdd<T>>;

  // `sources` have their channels innermost.
  Winograd(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
           const ConvWeight<T>& weight, const ConvFinish<T>& finish, const T* residual, T* y)
      : sources_(sources),
        zeros_(no_pixel(sources)),
        s_(s),
        tiles_(s),
        weight_(weight),
        finish_(finish),
        residual_(residual),
        y_(y),
        rows_(kInPhases * s.in),
        depth_(round_up(rows_, kLanes<A>)),
        groups_(kOutPhases * groups_each_) {}

  void run() const {
    if (tiles_.count() * kPositions * depth_ * int64_t(sizeof(A)) <= kFewInputs)
      share_outputs();
    else
      share_tiles();
  }

 private:
  static constexpr int64_t kGroup = Products::kGroup, kPixels = Products::kPixels;
  static constexpr int64_t kInPhases = Kind::kInPhases * Kind::kInPhases;
  static constexpr int64_t kOutPhases = Kind::kOutPhases * Kind::kOutPhases;
  // Inputs whose weights are packed at a time: those of 16 outputs fit the first cache.
  static constexpr int64_t kSome = (Kind::kKernel == 3 ? 4 : 2) * kLanes<A>;
  static constexpr int64_t kTiles = 4 * kPixels;  // whose sums stay in the second cache
  static constexpr int64_t kSums = kPositions * kTiles / kPixels;  // [position][tile][kGroup]
  static constexpr int64_t kInputBytes = 448 << 10, kWeightBytes = 4 << 20, kFewInputs = 2 << 20;

  // Few tiles: a thread transforms all of them for itself, and weights just before their products.
  void share_outputs() const {
    const int64_t threads = torch::stable::get_num_threads(), tiles = tiles_.count();
    const int64_t splits = std::min(groups_, threads);
    const int64_t ranges = std::clamp<int64_t>(tiles / kPixels, 1, threads / splits);
    torch::stable::parallel_for(0, ranges * splits, 1, [&](int64_t begin, int64_t end) {
      KeptBuffer<A> weight(kPositions * weight_plane());
      KeptBuffer<A> input(kPositions * input_plane((tiles + ranges - 1) / ranges));
      KeptBuffer<ConvSums<A>> sums(kSums);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t range = item / splits, split = item % splits;
        const int64_t first = tiles * range / ranges, last = tiles * (range + 1) / ranges;
        const int64_t plane = input_plane(last - first);
        transform_inputs(first, last - first, input.data(), plane);
        for (int64_t g = groups_ * split / splits; g < groups_ * (split + 1) / splits; ++g) {
          for (int64_t c = 0; c < s_.in; c += kSome) transform_weights(g, c, weight.data());
          for (int64_t t = first; t < last; t += kTiles)
            multiply(g, t, std::min(kTiles, last - t), weight.data(),
                     input.data() + (t - first) * depth_, plane, sums.data());
        }
      }
    });
  }

  // Many tiles: weights are transformed first, as many outputs as stay in the third cache.
  void share_tiles() const {
    const int64_t tiles = tiles_.count(), threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp<int64_t>(
        kInputBytes / (kPositions * depth_ * int64_t(sizeof(A))) / kPixels * kPixels, kPixels,
        kTiles);
    const int64_t shares = round_up((tiles + most - 1) / most, threads);
    const int64_t size = round_up((tiles + shares - 1) / shares, std::min<int64_t>(4, kPixels));
    const int64_t blocks = (tiles + size - 1) / size, plane = input_plane(size);

    const int64_t per_group = kPositions * weight_plane(), steps = (s_.in + kSome - 1) / kSome;
    const int64_t parts = std::max<int64_t>(1, groups_ * per_group * sizeof(A) / kWeightBytes);
    const int64_t together = (groups_ + parts - 1) / parts;
    KeptBuffer<A> weight(together * per_group);
    for (int64_t g = 0; g < groups_; g += together) {
      const int64_t n = std::min(together, groups_ - g);
      in_parallel(n * steps, kSome * kPositions * kGroup, [&](int64_t i) {
        transform_weights(g + i / steps, i % steps * kSome, weight.data() + i / steps * per_group);
      });
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        KeptBuffer<A> input(kPositions * plane);
        KeptBuffer<ConvSums<A>> sums(kSums);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * size, count = std::min(size, tiles - first);
          transform_inputs(first, count, input.data(), plane);
          for (int64_t i = 0; i < n; ++i)
            multiply(g + i, first, count, weight.data() + i * per_group, input.data(), plane,
                     sums.data());
        }
      });
    }
  }

  // From one position to the next of [tile][input] and of [input][kGroup]: a little more than they
  // take, so that the sixteen lie in different sets of the cache.
  int64_t input_plane(int64_t tiles) const { return round_up(tiles, kPixels) * depth_ + kLanes<A>; }
  int64_t weight_plane() const { return (depth_ + kLanes<A>)*kGroup; }

  void transform_inputs(int64_t first, int64_t count, A* to, int64_t plane) const {
    for (int64_t t = 0; t < count; ++t, to += depth_) {
      transform_tile<Kind>(sources_, s_, tiles_.at(first + t), zeros_.data(), to, plane);
      if (rows_ < depth_)
        for (int i = 0; i < kPositions; ++i)
          std::fill_n(to + i * plane + rows_, depth_ - rows_, A(0));
    }
  }

  // Of kSome inputs from c, in every phase; zero beyond the last output and row.
  void transform_weights(int64_t group, int64_t c, A* to) const {
    constexpr int64_t kOuts = kLanes<A>, kAll = Kind::kKernel * Kind::kKernel;
    alignas(64) A taps[kSome * kAll * kOuts];  // [input][tap][kOuts]
    const int64_t inputs = std::min(kSome, s_.in - c);
    const int phase = group / groups_each_;
    const int out_y = phase / Kind::kOutPhases, out_x = phase % Kind::kOutPhases;
    for (int64_t o = 0; o < kGroup; o += kOuts) {
      const int64_t first = group % groups_each_ * kGroup + o;
      const int64_t outs = std::clamp<int64_t>(s_.out - first, 0, kOuts);
      gather_outputs<kOuts>(weight_, kAll, first, outs, c, inputs, taps);
      for (int in_y = 0; in_y < Kind::kInPhases; ++in_y)
        for (int in_x = 0; in_x < Kind::kInPhases; ++in_x) {
          const A* w = taps;
          A* at = to + ((in_y * Kind::kInPhases + in_x) * s_.in + c) * kGroup + o;
          for (int64_t i = 0; i < inputs; ++i, w += kAll * kOuts, at += kGroup)
            both_ways<WeightPass<Kind::kTaps>, A>(
                [&](int y, int x) {
                  const int tap_y = Kind::tap(in_y + out_y, y), tap_x = Kind::tap(in_x + out_x, x);
                  return load(w + (tap_y * Kind::kKernel + tap_x) * kOuts);
                },
                [&](int y, int x, Vec<A> v) { store(at + (4 * y + x) * weight_plane(), v); });
        }
    }
    if (c + kSome >= s_.in)
      for (int i = 0; i < kPositions; ++i)
        std::fill_n(to + i * weight_plane() + rows_ * kGroup, (depth_ - rows_) * kGroup, A(0));
  }

  // A group of outputs of `count` tiles.
  void multiply(int64_t group, int64_t first, int64_t count, const A* w, const A* input,
                int64_t plane, ConvSums<A>* sums) const {
    const int64_t blocks = (count + kPixels - 1) / kPixels;
    for (int64_t i = 0; i < kPositions; ++i)
      Products::sum_pixels(input + i * plane, depth_, count, w + i * weight_plane(),
                           sums + i * blocks);
    transform_sums(group, first, count, reinterpret_cast<const A*>(sums),
                   blocks * kPixels * kGroup);
  }

  void transform_sums(int64_t group, int64_t first, int64_t count, const A* sums,
                      int64_t plane) const {
    constexpr int kOutputs = Kind::kOutputs, kStep = Kind::kStepOut;
    const int phase = group / groups_each_;
    const int64_t offset_y = Kind::out_offset(phase / Kind::kOutPhases);
    const int64_t offset_x = Kind::out_offset(phase % Kind::kOutPhases);
    const int64_t out = group % groups_each_ * kGroup;
    for (int64_t t = 0; t < count; ++t, sums += kGroup) {
      const auto tile = tiles_.at(first + t);
      const int64_t top = kStep * tile.row + offset_y, left = kStep * tile.column + offset_x;
      // Outputs of a row that are inside; of a transposed convolution's, one may be before it.
      const int64_t before = left < 0 ? 1 : 0;
      const int64_t inside = std::min<int64_t>(kOutputs, (tiles_.width - left + kStep - 1) / kStep);
      for (int64_t o = 0; o < kGroup && out + o < s_.out; o += kLanes<A>) {
        A outputs[kOutputs][kOutputs][kLanes<A>];
        both_ways<OutputPass<kOutputs>, A>(
            [&](int y, int x) { return load(sums + (4 * y + x) * plane + o); },
            [&](int y, int x, Vec<A> v) { store(outputs[y][x], v); });
        for (int64_t y = 0; y < kOutputs; ++y) {
          const int64_t row = top + kStep * y;
          if (row < 0 || row >= tiles_.height || inside <= before) continue;
          const int64_t pixel = (tile.image * tiles_.height + row) * tiles_.width + left;
          const int64_t at = (pixel + before * kStep) * s_.out;
          finish_.write({y_ + at, kStep * s_.out, {residual_ ? residual_ + at : nullptr}},
                        inside - before, out + o, outputs[y][before], kLanes<A>);
        }
      }
    }
  }

  const std::vector<ConvInput<T>>& sources_;
  const std::vector<T> zeros_;
  const ConvShape s_;
  const WinogradTiles<Kind> tiles_;
  const ConvWeight<T> weight_;
  const ConvFinish<T> finish_;
  const T* residual_;
  T* y_;
  const int64_t groups_each_ = (s_.out + kGroup - 1) / kGroup;  // of a phase of outputs
  const int64_t rows_, depth_, groups_;
};

}  // namespace aigc_fast

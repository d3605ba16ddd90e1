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
        pitch_(odd_lines(kPhases * s.in)),
        groups_((s.out + kGroup - 1) / kGroup) {}

  void run() const {
    // Weights are transformed once more for each range of tiles in the one, and read once more for
    // each few tiles in the other: these take the same time where inputs are five times the tiles.
    if (5 * tiles_.count() <= pitch_)
      share_outputs();
    else
      share_tiles();
  }

 private:
  static constexpr int64_t kGroup = Products::kGroup, kPixels = Products::kPixels;
  using Down = typename Kind::Down;
  using Across = typename Kind::Across;
  static constexpr int64_t kPositions = aigc_fast::kPositions<Kind>;
  static constexpr int kPhases = aigc_fast::kPhases<Kind>;
  static constexpr int kOutPhases = Kind::kStepOut * Kind::kStepOut;  // the others are added
  // Inputs whose products make one chain of additions, and whose weights are packed at a time:
  // short chains round less, which five points need more.
  static constexpr int64_t kSome = Kind::kStepIn == 1 ? 64 : 32;
  // Tiles at a time where there are many; their sums stay in the second cache.
  static constexpr int64_t kTiles = 4 * kPixels, kSums = kOutPhases * kPositions;
  static constexpr int64_t kInputBytes = 448 << 10, kWeightBytes = 4 << 20, kAllBytes = 8 << 20,
                           kSumBytes = 512 << 10;
  // From one position to the next of the weights of kSome inputs, [phase][input][kGroup]: a line
  // more than they take, so that the positions lie in different sets of the cache.
  static constexpr int64_t kWeightPlane = kPhases * kSome * kGroup + kLanes<A>;
  static constexpr int64_t kWeights = kPositions * kWeightPlane;

  // Few tiles: all are transformed first, and the weights just before their products.
  void share_outputs() const {
    const int64_t threads = torch::stable::get_num_threads(), tiles = tiles_.count();
    const int64_t size = std::min(tiles, tiles_of(kAllBytes, kPositions * pitch_));
    const int64_t each = tiles_of(kSumBytes, kSums * kGroup), plane = input_plane(size);
    KeptBuffer<A> input(kPositions * plane);
    for (int64_t first = 0; first < tiles; first += size) {
      const int64_t count = std::min(size, tiles - first);
      in_parallel(count, kPositions * pitch_, [&](int64_t t) {
        transform_inputs(first + t, 1, input.data() + t * pitch_, plane);
      });
      const int64_t blocks = (count + kPixels - 1) / kPixels;
      const int64_t ranges =
          std::clamp((threads + groups_ - 1) / groups_, (count + each - 1) / each, blocks);
      torch::stable::parallel_for(0, groups_ * ranges, 1, [&](int64_t begin, int64_t end) {
        KeptBuffer<A> weight(kWeights);
        KeptBuffer<ConvSums<A>> sums(kSums * ((blocks + ranges - 1) / ranges));
        for (int64_t item = begin; item < end; ++item) {
          const int64_t group = item / ranges, range = item % ranges;
          const int64_t t = blocks * range / ranges * kPixels;
          const int64_t n = std::min(blocks * (range + 1) / ranges * kPixels, count) - t;
          for (int64_t c = 0; c < s_.in; c += kSome) {
            transform_weights(group, c, weight.data());
            add_products(c, std::min(c + kSome, s_.in), n, weight.data(), input.data() + t * pitch_,
                         plane, sums.data());
          }
          transform_sums(group, first + t, n, sums.data());
        }
      });
    }
  }

  // Many tiles: weights are transformed first, as many outputs as stay in the third cache.
  void share_tiles() const {
    const int64_t tiles = tiles_.count(), threads = torch::stable::get_num_threads();
    const int64_t most = std::min(tiles_of(kInputBytes, kPositions * pitch_), kTiles);
    const int64_t shares = round_up((tiles + most - 1) / most, threads);
    const int64_t size = round_up((tiles + shares - 1) / shares, std::min<int64_t>(4, kPixels));
    const int64_t blocks = (tiles + size - 1) / size, plane = input_plane(size);

    const int64_t steps = (s_.in + kSome - 1) / kSome, per_group = steps * kWeights;
    const int64_t parts = std::max<int64_t>(1, groups_ * per_group * sizeof(A) / kWeightBytes);
    const int64_t together = (groups_ + parts - 1) / parts;
    KeptBuffer<A> weight(together * per_group);
    for (int64_t g = 0; g < groups_; g += together) {
      const int64_t n = std::min(together, groups_ - g);
      in_parallel(n * steps, kWeights, [&](int64_t i) {
        transform_weights(g + i / steps, i % steps * kSome, weight.data() + i * kWeights);
      });
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        KeptBuffer<A> input(kPositions * plane);
        KeptBuffer<ConvSums<A>> sums(kSums * kTiles / kPixels);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * size, count = std::min(size, tiles - first);
          transform_inputs(first, count, input.data(), plane);
          for (int64_t i = 0; i < n; ++i) {
            add_products(0, s_.in, count, weight.data() + i * per_group, input.data(), plane,
                         sums.data());
            transform_sums(g + i, first, count, sums.data());
          }
        }
      });
    }
  }

  // Whole blocks of tiles that fit, with so many elements each.
  static int64_t tiles_of(int64_t bytes, int64_t elements) {
    return std::max<int64_t>(1, bytes / (elements * int64_t(sizeof(A))) / kPixels) * kPixels;
  }

  // An odd number of lines of the cache: neighbours then lie in different sets.
  static int64_t odd_lines(int64_t n) {
    return (round_up(n, kLanes<A>) / kLanes<A> | 1) * kLanes<A>;
  }

  // From one position to the next of [tile][phase][input].
  int64_t input_plane(int64_t tiles) const { return odd_lines(round_up(tiles, kPixels) * pitch_); }

  void transform_inputs(int64_t first, int64_t count, A* to, int64_t plane) const {
    for (int64_t t = 0; t < count; ++t, to += pitch_)
      transform_tile<Kind>(sources_, s_, tiles_.at(first + t), zeros_.data(), to, plane);
  }

  // Of kSome inputs from c, in every phase; zero beyond the last output.
  void transform_weights(int64_t group, int64_t c, A* to) const {
    constexpr int64_t kOuts = kLanes<A>, kAll = Kind::kKernel * Kind::kKernel;
    alignas(64) A taps[kSome * kAll * kOuts];  // [input][tap][kOuts]
    const int64_t inputs = std::min(kSome, s_.in - c);
    for (int64_t o = 0; o < kGroup; o += kOuts) {
      const int64_t first = group * kGroup + o;
      gather_outputs<kOuts>(weight_, kAll, first, std::clamp<int64_t>(s_.out - first, 0, kOuts), c,
                            inputs, taps);
      A* at = to + o;
      for (int phase = 0; phase < kPhases; ++phase) {
        const A* w = taps;
        for (int64_t i = 0; i < inputs; ++i, w += kAll * kOuts, at += kGroup)
          both_ways<typename Down::Weight, typename Across::Weight, A>(
              [&](int y, int x) {
                const int down = Kind::tap(phase / Kind::kPhases, y);
                const int across = Kind::tap(phase % Kind::kPhases, x);
                return load(w + (down * Kind::kKernel + across) * kOuts);
              },
              [&](int y, int x, Vec<A> v) {
                store(at + (Across::kPoints * y + x) * kWeightPlane, v);
              });
      }
    }
  }

  // Adds, or puts, the products of inputs from `first` to `end` of `count` tiles to the sums of a
  // group of outputs, [phase of outputs][position][tile][kGroup].
  void add_products(int64_t first, int64_t end, int64_t count, const A* weight, const A* input,
                    int64_t plane, ConvSums<A>* sums) const {
    const int64_t blocks = (count + kPixels - 1) / kPixels;
    for (int64_t i = 0; i < kPositions;
         ++i, weight += kWeightPlane, input += plane, sums += blocks) {
      const A* w = weight;
      for (int64_t c = first; c < end; c += kSome, w += kWeights) {
        const int64_t inputs = std::min(kSome, end - c);
        for (int64_t b = 0; b < blocks; ++b) {
          const A* from = input + b * kPixels * pitch_ + c;
          ConvSums<A> added;
          for (int phase = 0; phase < kPhases; ++phase) {
            const bool more = kOutPhases < kPhases ? phase > 0 : c > 0;
            Products::sum_pixels(
                from + phase * s_.in, inputs, pitch_, count - b * kPixels,
                w + phase * inputs * kGroup, more,
                kOutPhases < kPhases ? added : sums[phase * kPositions * blocks + b]);
          }
          if constexpr (kOutPhases < kPhases) keep_sums<kPixels, A>(added.of, c > 0, sums[b]);
        }
      }
    }
  }

  void transform_sums(int64_t group, int64_t first, int64_t count,
                      const ConvSums<A>* totals) const {
    constexpr int kStep = Kind::kStepOut;
    const A* sums = reinterpret_cast<const A*>(totals);
    const int64_t plane = round_up(count, kPixels) * kGroup, out = group * kGroup;
    for (int phase = 0; phase < kOutPhases; ++phase, sums += kPositions * plane)
      for (int64_t t = 0; t < count; ++t) {
        const auto tile = tiles_.at(first + t);
        const int64_t top = kStep * tile.row + Kind::out_offset(phase / kStep);
        const int64_t left = kStep * tile.column + Kind::out_offset(phase % kStep);
        const int64_t inside =
            std::min<int64_t>(Across::kOutputs, (tiles_.width - left + kStep - 1) / kStep);
        for (int64_t o = 0; o < kGroup && out + o < s_.out; o += kLanes<A>) {
          A outputs[Down::kOutputs][Across::kOutputs][kLanes<A>];
          both_ways<typename Down::Output, typename Across::Output, A>(
              [&](int y, int x) {
                return load(sums + (Across::kPoints * y + x) * plane + t * kGroup + o);
              },
              [&](int y, int x, Vec<A> v) { store(outputs[y][x], v); });
          for (int64_t y = 0; y < Down::kOutputs; ++y) {
            const int64_t row = top + kStep * y;
            if (row >= tiles_.height) break;
            const int64_t at = ((tile.image * tiles_.height + row) * tiles_.width + left) * s_.out;
            finish_.write({y_ + at, kStep * s_.out, {residual_ ? residual_ + at : nullptr}}, inside,
                          out + o, outputs[y][0], kLanes<A>);
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
  const int64_t pitch_, groups_;  // from one tile to the next of its inputs, [phase][input]
};

}  // namespace aigc_fast

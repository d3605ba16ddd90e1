// The gradient of a convolution's weight by Winograd's algorithm:
//
//   dw = G' [ sum over tiles of (A dy A') * (B' x B) ] G
//
// which is a product of matrices for each position, whose sums run over the tiles.
#pragma once

#include "conv_vectors.h"
#include "copy_transposed.h"
#include "winograd_tiles.h"

namespace aigc_fast {

template <class Kind, class T>
class WinogradWeight {
  static_assert(Kind::kStepOut == 1);

 public:
  using A = Acc<T>;

  // Of x and the gradient of y, both with their channels innermost; s has the channels of both.
  WinogradWeight(const ConvInput<T>& x, const ConvInput<T>& grad, const ConvShape& s)
      : x_{x}, grad_{grad}, zeros_(std::max(s.in, s.out)), s_(s), tiles_(s) {}

  // To (out, in, kernel, kernel), contiguous.
  void run(T* to) const {
    // Sums of so many outputs stay in the third cache, and so do transformed tiles.
    const int64_t together = std::clamp<int64_t>(kSumBytes / (per_group() * sizeof(A)), 1, groups_);
    const int64_t row = kPositions * (in_pitch_ + together * kGroup) * sizeof(A);
    const int64_t most = std::clamp<int64_t>(kTileBytes / row / kChain, 1, 64) * kChain;
    KeptBuffer<A> sums(together * per_group());
    for (int64_t g = 0; g < groups_; g += together) {
      const int64_t n = std::min(together, groups_ - g);
      for (int64_t first = 0; first < tiles_.count(); first += most)
        add_tiles(g, n, first, std::min(most, tiles_.count() - first), sums.data());
      finish(g, n, sums.data(), to);
    }
  }

 private:
  using Down = typename Kind::Down;
  using Across = typename Kind::Across;
  static constexpr int64_t kPositions = aigc_fast::kPositions<Kind>;
  static constexpr int64_t kGroup = kConvOuts * kLanes<A>, kInputs = kConvPixels, kChain = 16;
  static constexpr int64_t kSumBytes = 8 << 20, kTileBytes = 2 << 20;

  int64_t per_group() const { return kPositions * blocks_ * kInputs * kGroup; }

  // Adds, or puts, the products of some tiles to the sums of n groups of outputs from group g:
  // [group][position][input][kGroup].
  void add_tiles(int64_t g, int64_t n, int64_t first, int64_t count, A* totals) const {
    const int64_t grad_pitch = n * kGroup;
    const int64_t in_plane = count * in_pitch_, grad_plane = count * grad_pitch;
    KeptBuffer<A> input_memory(kPositions * in_plane), grad_memory(kPositions * grad_plane);
    A *const inputs = input_memory.data(), *const grads = grad_memory.data();
    std::vector<ConvInput<T>> some = grad_;  // its channels of these groups
    some[0].data += g * kGroup;
    some[0].channels = std::min(n * kGroup, s_.out - g * kGroup);
    in_parallel(count, kPositions * (in_pitch_ + grad_pitch), [&](int64_t t) {
      const auto tile = tiles_.at(first + t);
      transform_tile<Kind>(x_, s_, tile, zeros_.data(), inputs + t * in_pitch_, in_plane);
      transform_pixels<typename Down::GradOutput, typename Across::GradOutput>(
          some, tiles_.height, tiles_.width, tile.image, tile.row, tile.column, 1, zeros_.data(),
          grads + t * grad_pitch, grad_plane);
    });
    // Where there are few outputs, threads share the inputs too.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t splits = std::clamp<int64_t>(2 * threads / n, 1, blocks_);
    torch::stable::parallel_for(0, n * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / splits, split = item % splits;
        auto* sums = reinterpret_cast<ConvSums<A>*>(totals + group * per_group());
        for (int64_t i = 0; i < kPositions; ++i, sums += blocks_)
          for (int64_t t = 0; t < count; t += kChain)
            for (int64_t b = blocks_ * split / splits; b < blocks_ * (split + 1) / splits; ++b)
              add_outer_products<kInputs, kConvOuts>(
                  inputs + i * in_plane + t * in_pitch_ + b * kInputs, in_pitch_,
                  grads + i * grad_plane + t * grad_pitch + group * kGroup, grad_pitch,
                  std::min(kChain, count - t), first + t > 0, sums[b]);
      }
    });
  }

  void finish(int64_t g, int64_t n, const A* sums, T* to) const {
    constexpr int64_t kSome = kLanes<A>, kAll = Kind::kKernel * Kind::kKernel;
    const int64_t steps = (s_.in + kSome - 1) / kSome, plane = blocks_ * kInputs * kGroup;
    in_parallel(n * steps, kSome * kPositions * kGroup, [&](int64_t item) {
      const int64_t group = item / steps, c = item % steps * kSome;
      const int64_t inputs = std::min(kSome, s_.in - c), first = (g + group) * kGroup;
      alignas(64) A taps[kSome * kAll * kGroup];  // [input][tap][kGroup]
      for (int64_t i = 0; i < inputs; ++i)
        for (int phase = 0; phase < kPhases<Kind>; ++phase)
          for (int64_t o = 0; o < kGroup; o += kLanes<A>) {
            const int64_t row = phase * s_.in + c + i;
            const A* from = sums + group * per_group() + row * kGroup + o;
            A* at = taps + i * kAll * kGroup + o;
            both_ways<typename Down::GradWeight, typename Across::GradWeight, A>(
                [&](int y, int x) { return load(from + (Across::kPoints * y + x) * plane); },
                [&](int y, int x, Vec<A> v) {
                  const int tap_y = Kind::tap(phase / Kind::kPhases, y);
                  const int tap_x = Kind::tap(phase % Kind::kPhases, x);
                  store(at + (tap_y * Kind::kKernel + tap_x) * kGroup, v);
                });
          }
      copy_transposed(taps, kGroup, std::min(kGroup, s_.out - first), inputs * kAll,
                      to + (first * s_.in + c) * kAll, s_.in * kAll);
    });
  }

  const std::vector<ConvInput<T>> x_, grad_;
  const std::vector<T> zeros_;
  const ConvShape s_;
  const WinogradTiles<Kind> tiles_;
  const int64_t groups_ = (s_.out + kGroup - 1) / kGroup;
  const int64_t blocks_ = (kPhases<Kind> * s_.in + kInputs - 1) / kInputs;
  // An odd number of lines of memory: neighbouring tiles then lie in different sets of the cache.
  const int64_t in_pitch_ = (round_up(blocks_ * kInputs, kLanes<A>) / kLanes<A> | 1) * kLanes<A>;
};

// The same of tensors: grad (batch, out, height, width) of y, and x.
template <class Kind>
Tensor winograd_weight(const Tensor& grad_in, const Tensor& x_in) {
  require(grad_in.dim() == 4 && x_in.dim() == 4, "grad and x must have 4 dimensions");
  require(grad_in.scalar_type() == x_in.scalar_type(), "grad must have the dtype of x");
  require(grad_in.size(0) == x_in.size(0) && grad_in.size(2) == Kind::length(x_in.size(2)) &&
              grad_in.size(3) == Kind::length(x_in.size(3)),
          "grad must have the sizes of the output");
  const ConvShape s{x_in.size(0), x_in.size(2), x_in.size(3), x_in.size(1), grad_in.size(1)};
  Tensor weight = empty({s.out, s.in, Kind::kKernel, Kind::kKernel}, x_in.scalar_type());
  dispatch(x_in, "x", [&]<class T>(T) {
    if (x_in.numel() == 0 || grad_in.numel() == 0) {  // a sum of nothing
      if (weight.numel() > 0)
        std::memset(static_cast<void*>(mutable_data<T>(weight)), 0, weight.numel() * sizeof(T));
      return;
    }
    const Tensor x = channels_innermost<T>(x_in), grad = channels_innermost<T>(grad_in);
    WinogradWeight<Kind, T>(input_of<T>(x), input_of<T>(grad), s).run(mutable_data<T>(weight));
  });
  return weight;
}

}  // namespace aigc_fast

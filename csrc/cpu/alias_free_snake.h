// What the two directions of alias_free_snake have in common beside their filters: x cut into
// tiles, and the parameters.
#pragma once

#include "alias_free_filters.h"
#include "memory_order.h"
#include "snake.h"

namespace aigc_fast {

constexpr int64_t kTileSamples = 512;  // tiles have this many samples or up to twice as many
// The same of tiles with channels side by side, in elements; and channels of these, or up to twice
// as many.
constexpr int64_t kTileElements = 4096, kTileChannels = 64;

// The parameters of a tile's channels.
template <class A>
struct ChannelSnake {
  const A* alpha;
  const double* inverse_beta;
};

// x as tiles, which its shape and memory order alone decide.
struct SequenceTiles {
  int64_t batch, channels, time;
  bool innermost;  // the channels, in memory
  int64_t width = 1, blocks = 1, pieces = 1;

  int64_t count() const { return batch * blocks * pieces; }
  int64_t first_channel(int64_t u) const { return u / pieces % blocks * width; }
  // Where the sequences of a tile begin.
  int64_t place(int64_t u) const {
    const int64_t n = u / pieces / blocks, c = first_channel(u);
    return n * channels * time + (innermost ? c : c * time);
  }
  SequenceTile tile(int64_t u) const {
    const int64_t first = u % pieces * time / pieces, end = (u % pieces + 1) * time / pieces;
    const bool last = u / pieces % blocks == blocks - 1;
    const int64_t wide = last ? channels - first_channel(u) : width;
    return {time, first, end - first, wide, innermost ? channels : 1};
  }
  // The largest of any tile.
  int64_t widest() const { return channels - (blocks - 1) * width; }
  int64_t elements() const { return (time + pieces - 1) / pieces * widest(); }
};

inline SequenceTiles sequence_tiles(const Tensor& x, const Tensor& alpha, const Tensor& beta,
                                    bool innermost) {
  require(x.dim() == 3, "x must have 3 dimensions");
  require(x.size(2) > 0, "x must have at least one sample");
  require(alpha.scalar_type() == x.scalar_type(), "alpha must have the dtype of x");
  require(beta.scalar_type() == x.scalar_type(), "beta must have the dtype of x");
  SequenceTiles s{x.size(0), x.size(1), x.size(2), innermost};
  const int64_t across = std::max<int64_t>(1, s.channels / kTileChannels);
  s.blocks = innermost ? across : s.channels;
  s.width = !innermost ? 1 : across > 1 ? kTileChannels : s.channels;
  const int64_t samples = innermost ? kTileElements / std::max<int64_t>(1, s.width) : kTileSamples;
  s.pieces = std::max<int64_t>(1, s.time / std::max<int64_t>(1, samples));
  return s;
}

// What all tiles share.
template <class A>
struct AliasFreeCall {
  A up[kTaps], down[kTaps];
  std::vector<A> alpha;
  std::vector<double> inverse_beta;

  AliasFreeCall(const SequenceTiles& s, const Tensor& alpha_in, const Tensor& beta_in,
                const Tensor& up_filter, const Tensor& down_filter)
      : alpha(channel_values<A>(alpha_in, s.channels, "alpha", 0)),
        inverse_beta(inverse_of(beta_in, s.channels)) {
    channel_values<A>(up_filter, kTaps, "up_filter", A(0), up);
    channel_values<A>(down_filter, kTaps, "down_filter", A(0), down);
    for (A& tap : up) tap *= 2;
  }

  // f(work, number, place, tile, snake) for every tile, in parallel; each thread has its `work`.
  template <class Work, class F>
  void for_tiles(const SequenceTiles& s, F f) const {
    const int64_t grain = grain_of(4 * s.elements());
    torch::stable::parallel_for(0, s.count(), grain, [&](int64_t begin, int64_t end) {
      Work work(s.elements(), s.widest());
      std::copy_n(up, kTaps, work.up);
      std::copy_n(down, kTaps, work.down);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t c = s.first_channel(u);
        f(work, u, s.place(u), s.tile(u),
          ChannelSnake<A>{alpha.data() + c, inverse_beta.data() + c});
      }
    });
  }
};

}  // namespace aigc_fast

// The walk of every norm with statistics of its own, and of snake: sums over each norm, a few
// numbers made of them, and a pass that writes.
//
// A norm is a set of elements that share a mean and a variance: a channel of the batch, a channel
// of a sample, or a pixel. Seen in memory order as [samples][rows][channels][inner] a dense tensor
// has a norm for each (sample, channel).
#pragma once

#include <functional>

#include "tensor.h"

namespace aigc_fast {

struct Norms {
  int64_t samples, rows, channels, inner;

  int64_t count() const { return rows * inner; }        // elements of a norm
  int64_t total() const { return samples * channels; }  // norms
  // Neighbours in memory belong to different norms.
  bool across() const { return inner == 1; }
};

// The channels of a dense tensor as norms.
inline Norms norms_of_channels(const Tensor& x) {
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  const int64_t size = x.numel(), channels = x.size(1);
  // The stride of a dimension of one element says nothing.
  const int64_t inner = channels == 1 ? std::max<int64_t>(1, size) : x.stride(1);
  return {1, size / std::max<int64_t>(1, channels * inner), channels, inner};
}

// Elements of a tile of several norms, and norms of it at most where they lie side by side.
constexpr int64_t kTileElements = 2048, kTileNorms = 256;
// Elements that stay in the L2 cache between the sums and the writing.
constexpr int64_t kUnitElements = 65536;
// Numbers of neighbouring norms are read in pairs of vectors: as many follow the last.
constexpr int64_t kExcess = 32;

// Elements [first, last) of each of the norms norm(), ..., norm() + width - 1.
struct Tile {
  const Norms& norms;
  int64_t sample, channel, width, first, last;

  int64_t norm() const { return sample * norms.channels + channel; }
  // f(place in the tensor, elements, elements to the next run) for the runs of neighbours in the
  // j-th norm.
  template <class F>
  AIGC_INLINE void for_runs(int64_t j, F&& f) const {
    const auto& [samples, rows, channels, inner] = norms;
    if (rows == 1) return f((norm() + j) * inner + first, last - first, 0);
    int64_t row = sample * rows + first / inner, start = first % inner;
    for (int64_t e = first; e < last; ++row, start = 0) {
      const int64_t n = std::min(inner - start, last - e);
      f((row * channels + channel + j) * inner + start, n, (channels - 1) * inner);
      e += n;
    }
  }
  // The place of the first norm's element in a row, where neighbours belong to different ones.
  int64_t place(int64_t row) const {
    return (sample * norms.rows + row) * norms.channels + channel;
  }
};

// ---- the walk ----------------------------------------------------------------------------------

// How the norms are cut into units of work, which the shape alone decides: some neighbouring ones,
// or a large one; and a unit into pieces where it outgrows the cache and there are few.
struct Cut {
  const Norms& norms;
  int64_t width = 1, across, units, piece, pieces;  // piece: elements of each norm

  explicit Cut(const Norms& n) : norms(n) {
    if (n.across()) {
      const int64_t fits = kUnitElements / std::max<int64_t>(1, n.rows) / 64 * 64;
      width = fits < 64 ? kTileNorms : std::min(kTileNorms, fits);
    } else {
      width = kTileElements / std::max<int64_t>(1, n.count());
    }
    width = std::max<int64_t>(1, std::min(n.channels, width));
    across = (n.channels + width - 1) / width;
    units = n.samples * across;
    const bool cached = n.count() * width <= kUnitElements || (!n.across() && units >= 32);
    piece = cached ? std::max<int64_t>(1, n.count()) : std::max<int64_t>(1, kUnitElements / width);
    pieces = std::max<int64_t>(1, (n.count() + piece - 1) / piece);
  }
  // Sums of a unit: how far those of one kind lie from the next.
  int64_t columns() const { return width + kExcess; }

  // The whole of a piece.
  Tile tile(int64_t unit, int64_t number) const {
    const int64_t sample = unit / across, channel = (unit - sample * across) * width;
    const int64_t own = std::min(width, norms.channels - channel), first = number * piece;
    return {norms, sample, channel, own, first, std::min(norms.count(), first + piece)};
  }
  // f(tile) for the tiles of a piece.
  template <class F>
  void for_tiles(Tile whole, F&& f) const {
    if (!norms.across()) return f(whole);
    const int64_t height = kTileElements / std::max(kExcess, whole.width);
    for (int64_t e = whole.first; e < whole.last; e += height)
      f(Tile{norms, whole.sample, whole.channel, whole.width, e, std::min(whole.last, e + height)});
  }
  // f(first, last) for ranges of `count` things that take as long as a piece each.
  template <class F>
  void in_parallel(int64_t count, F&& f) const {
    const int64_t elements = width * std::min(piece, norms.count());
    torch::stable::parallel_for(0, count, grain_of(elements), f);
  }
};

// What a kernel does of the walk: compiled once, it calls them once a tile or a norm.
using WriteTile = std::function<void(const Tile&)>;
using SumTile = std::function<void(const Tile&, double* sums, int64_t columns)>;
using FinishNorms = std::function<void(const Tile&, const double* sums, int64_t columns)>;

// f(norm, its N sums) for the norms of a tile.
template <int N, class F>
FinishNorms for_norms(F f) {
  return [f](const Tile& tile, const double* sums, int64_t columns) {
    for (int64_t j = 0; j < tile.width; ++j) {
      double own[N];
      for (int s = 0; s < N; ++s) own[s] = sums[s * columns + j];
      f(tile.norm() + j, own);
    }
  };
}

// write(tile) for all tiles.
inline void for_all_tiles(const Norms& norms, const WriteTile& write) {
  const Cut cut(norms);
  cut.in_parallel(cut.units * cut.pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cut.for_tiles(cut.tile(i / cut.pieces, i % cut.pieces), write);
  });
}

// For each norm: sum(tile, sums, columns) of its tiles, finish(all of it, its `count` sums), and
// write(tile), if there is one.
inline void sum_then_write(const Norms& norms, int count, const SumTile& sum,
                           const FinishNorms& finish, const WriteTile& write = nullptr) {
  const Cut cut(norms);
  const int64_t columns = cut.columns(), size = count * columns;
  const auto add_up = [&](const Tile& whole, double* sums) {
    cut.for_tiles(whole, [&](const Tile& tile) { sum(tile, sums, columns); });
  };
  if (cut.pieces == 1) {
    cut.in_parallel(cut.units, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(size);
      for (int64_t unit = begin; unit < end; ++unit) {
        const Tile whole = cut.tile(unit, 0);
        std::fill(sums.begin(), sums.end(), 0.0);
        add_up(whole, sums.data());
        finish(whole, sums.data(), columns);
        if (write) cut.for_tiles(whole, write);
      }
    });
    return;
  }
  std::vector<double> parts(cut.units * cut.pieces * size);
  cut.in_parallel(cut.units * cut.pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add_up(cut.tile(i / cut.pieces, i % cut.pieces), parts.data() + i * size);
  });
  for (int64_t unit = 0; unit < cut.units; ++unit) {
    double* first = parts.data() + unit * cut.pieces * size;
    for (int64_t p = 1; p < cut.pieces; ++p)
      for (int64_t i = 0; i < size; ++i) first[i] += first[p * size + i];
    finish(cut.tile(unit, 0), first, columns);
  }
  if (write) for_all_tiles(norms, write);
}

}  // namespace aigc_fast

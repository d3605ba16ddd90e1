// The walk of every norm with statistics of its own, and of snake: sums over each norm, a few
// numbers made of them, and a pass that writes.
//
// A norm is a set of elements that share a mean and a variance: a channel of the batch, a channel
// of a sample, or a pixel. Seen in memory order as [samples][rows][channels][inner] a dense tensor
// has a norm for each (sample, channel). Tiles of it are copied to buffers in the L1 cache, widened
// on the way, so that arithmetic knows neither dtypes nor memory orders: a kernel is a few short
// loops over buffers, and the activations are compiled once and not once for each dtype.
#pragma once

#include "memory_order.h"
#include "sums.h"
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

// Calls f with a value of the type that x is computed in.
template <class F>
void with_arithmetic(const Tensor& x, F&& f) {
  dispatch(x, "x", [](auto) {});  // refuses what is not floating
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// Elements of a tile: six fp32 buffers of them fit the L1 cache.
constexpr int64_t kTile = 1024;
// Norms of a tile at most, where neighbours belong to different ones.
constexpr int64_t kColumns = 256;
// Elements that stay in the L2 cache between the sums and the writing.
constexpr int64_t kUnit = 65536;
// Terms that meet in fp32 before fp64 takes over. The sums decide every gradient of a channel:
// chains of 8, joined in fp32, were up to 1.4 times over the error rule.
constexpr int kChain = 4;

template <class A>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Elements [first, last) of the norms norm(), norm() + 1, ...: `width` of them in a row of the tile
// where neighbours belong to different norms, else one.
struct Tile {
  const Norms& norms;
  int64_t sample, channel, width, first, last;

  int64_t norm() const { return sample * norms.channels + channel; }
  // Elements from one row of the buffers to the next.
  template <class A>
  int64_t pitch() const {
    return norms.across() ? padded<A>(width) : 0;
  }
  template <class A>
  int64_t size() const {
    return (last - first) * (norms.across() ? padded<A>(width) : 1);
  }
  // f(place in the tensor, place in the buffer, elements) for runs of neighbours.
  template <class A, class F>
  AIGC_INLINE void for_runs(F&& f) const {
    const auto& [samples, rows, channels, inner] = norms;
    if (norms.across()) {
      for (int64_t r = first; r < last; ++r)
        f((sample * rows + r) * channels + channel, (r - first) * pitch<A>(), width);
      return;
    }
    int64_t row = sample * rows + first / inner, start = first % inner;
    for (int64_t e = first; e < last; ++row, start = 0) {
      const int64_t n = std::min(inner - start, last - e);
      f((row * channels + channel) * inner + start, e - first, n);
      e += n;
    }
  }
};

// A tile's values of one tensor. Stores of whole vectors may pass the end of what is used.
template <class A>
struct Buffer {
  A at[kTile + kLanes<A>];
};

// A tensor of any dtype, tile by tile in A.
template <class A>
struct Stream {
  void* data;
  void (*load_)(const void*, const Tile&, A*);
  void (*store_)(void*, const Tile&, const A*);
  double (*value_)(const void*, int64_t);

  // What the last vector has in excess is zero: a function that looks at all lanes of a vector, as
  // sines() does, must not see what was in memory.
  void load(const Tile& tile, Buffer<A>& to) const { load_(data, tile, to.at); }
  void store(const Tile& tile, const Buffer<A>& from) const { store_(data, tile, from.at); }
  double value(int64_t i) const { return value_(data, i); }
};

template <class A, class T>
Stream<A> stream_of(T* x) {
  return {
      x,
      [](const void* from, const Tile& tile, A* to) {
        const T* x = static_cast<const T*>(from);
        tile.for_runs<A>([&](int64_t at, int64_t in, int64_t n) {
          for_vectors<A>(
              n, [&](int64_t j, auto lanes) { store(to + in + j, load(x + at + j, lanes)); });
        });
        aigc_fast::store(to + tile.size<A>(), Vec<A>{});
      },
      [](void* to, const Tile& tile, const A* from) {
        T* x = static_cast<T*>(to);
        tile.for_runs<A>([&](int64_t at, int64_t in, int64_t n) {
          for_vectors<A>(
              n, [&](int64_t j, auto lanes) { store(x + at + j, load(from + in + j), lanes); });
        });
      },
      [](const void* from, int64_t i) -> double {
        if constexpr (std::is_same_v<T, double>) return static_cast<const double*>(from)[i];
        return load_n(static_cast<const T*>(from) + i, 1)[0];
      },
  };
}
template <class A>
Stream<A> stream_of(const Tensor& x) {
  if constexpr (std::is_same_v<A, double>) {
    return stream_of<A>(mutable_data<double>(x));
  } else {
    if (x.scalar_type() == ScalarType::BFloat16) return stream_of<A>(mutable_data<bf16>(x));
    if (x.scalar_type() == ScalarType::Half) return stream_of<A>(mutable_data<fp16>(x));
    return stream_of<A>(mutable_data<float>(x));
  }
}

// Numbers of each norm, [V][norms].
template <class A, int V>
class Values {
 public:
  explicit Values(int64_t norms) : stride_(norms + kLanes<A>), of_(V * stride_) {}
  A* row(int k) { return of_.data() + k * stride_; }
  Vec<A> alone(int k, int64_t norm) const { return broadcast(of_[k * stride_ + norm]); }
  Vec<A> several(int k, int64_t norm) const { return load(of_.data() + k * stride_ + norm); }

 private:
  int64_t stride_;
  std::vector<A> of_;
};

// f(place in the buffers, values of the vector's norms) for every vector of a tile; the buffers'
// excess is computed too, and nobody reads it.
template <class A, int V, class F>
AIGC_INLINE void for_tile(const Tile& tile, const Values<A, V>& values, F&& f) {
  Vec<A> at[V];
  if (!tile.norms.across()) {
    for (int k = 0; k < V; ++k) at[k] = values.alone(k, tile.norm());
    for (int64_t i = 0; i < tile.size<A>(); i += kLanes<A>) f(i, at);
    return;
  }
  for (int64_t j = 0; j < tile.width; j += kLanes<A>) {
    for (int k = 0; k < V; ++k) at[k] = values.several(k, tile.norm() + j);
    for (int64_t i = j; i < tile.size<A>(); i += tile.pitch<A>()) f(i, at);
  }
}

// ---- sums in fp64 ------------------------------------------------------------------------------

// The first n lanes of v, and zero in the others.
template <class A>
AIGC_INLINE Vec<A> first_lanes(Vec<A> v, int64_t n) {
  for (int64_t k = n; k < kLanes<A>; ++k) v[k] = 0;
  return v;
}

// Adds x - shift and its square to two sums of each norm, all in fp64: whatever the shift, a large
// mean costs no digits.
template <class A>
void add_deviations(const Tile& tile, const Buffer<A>& x, const double* shift, double* sums,
                    int64_t columns) {
  constexpr int64_t lanes = kLanes<double>;
  const int64_t size = tile.size<A>(), pitch = tile.pitch<A>();
  if (tile.norms.across()) {
    for (int64_t j = 0; j < tile.width; j += lanes) {
      const Vec<double> base = load(shift + j);
      Vec<double> sum = load(sums + j), squares = load(sums + columns + j);
      for (int64_t i = j; i < size; i += pitch) {
        const Vec<double> d = load_wide(x.at + i) - base;
        sum += d;
        squares += d * d;
      }
      store(sums + j, sum);
      store(sums + columns + j, squares);
    }
    return;
  }
  Vec<double> sum[2] = {}, squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= size; i += 2 * lanes)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const Vec<double> d = load_wide(x.at + i + k * lanes) - *shift;
      sum[k] += d;
      squares[k] += d * d;
    }
  double rest[2] = {};
  for (; i < size; ++i) {
    const double d = x.at[i] - *shift;
    rest[0] += d;
    rest[1] += d * d;
  }
  sums[0] += sum_lanes<double>(sum[0] + sum[1]) + rest[0];
  sums[columns] += sum_lanes<double>(squares[0] + squares[1]) + rest[1];
}

// Adds what f(place, values, sums) adds to N sums of each norm of a tile: sums[s * columns + j] for
// the j-th. The excess of a run must not reach f's sums where the tile lies along one norm.
template <class A, int N, int V, class F>
AIGC_INLINE void add_tile(const Tile& tile, const Values<A, V>& values, double* sums,
                          int64_t columns, F&& f) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t size = tile.size<A>();
  Vec<A> at[V];
  if (!tile.norms.across()) {
    for (int k = 0; k < V; ++k) at[k] = values.alone(k, tile.norm());
    Wide<A> totals[N];
    const auto join = [&](const Vec<A>* chain) {
      for (int s = 0; s < N; ++s) totals[s] += widen<A>(chain[s]);
    };
    int64_t i = 0;
    for (; i + kChain * lanes <= size; i += kChain * lanes) {
      Vec<A> chain[N] = {};
#pragma GCC unroll 4
      for (int k = 0; k < kChain; ++k) f(i + k * lanes, at, chain);
      join(chain);
    }
    for (; i < size; i += lanes) {
      Vec<A> chain[N] = {};
      f(i, at, chain);
      if (i + lanes > size)
        for (int s = 0; s < N; ++s) chain[s] = first_lanes<A>(chain[s], size - i);
      join(chain);
    }
    for (int s = 0; s < N; ++s) sums[s * columns] += totals[s].sum();
    return;
  }
  const int64_t pitch = tile.pitch<A>();
  for (int64_t j = 0; j < tile.width; j += lanes) {
    for (int k = 0; k < V; ++k) at[k] = values.several(k, tile.norm() + j);
    for (int64_t start = j; start < size; start += kChain * pitch) {
      Vec<A> chain[N] = {};
      for (int64_t i = start; i < std::min(size, start + kChain * pitch); i += pitch)
        f(i, at, chain);
      for (int s = 0; s < N; ++s)
        add_to(sums + s * columns + j, widen<A>(chain[s]), std::integral_constant<int, lanes>{});
    }
  }
}

// ---- the walk ----------------------------------------------------------------------------------

// How the norms are cut into units of work, which the shape alone decides: one norm, or some
// neighbouring ones; and a unit into pieces where it outgrows the cache and there are few.
template <class A>
struct Cut {
  const Norms& norms;
  int64_t width = 1, across, units, piece, pieces;  // piece: elements of each norm

  explicit Cut(const Norms& n) : norms(n) {
    if (n.across()) {
      const int64_t fits = kUnit / std::max<int64_t>(1, n.rows) / 64 * 64;
      width = std::min(n.channels, fits < 64 ? kColumns : std::min(kColumns, fits));
      width = std::max<int64_t>(1, width);
    }
    across = (n.channels + width - 1) / width;
    units = n.samples * across;
    const bool cached = n.count() * width <= kUnit || (!n.across() && units >= 32);
    piece = cached ? std::max<int64_t>(1, n.count()) : std::max<int64_t>(1, kUnit / width);
    pieces = std::max<int64_t>(1, (n.count() + piece - 1) / piece);
  }
  // Sums of a unit: how far those of one kind lie from the next.
  int64_t columns() const { return padded<A>(width); }

  // f(tile) for the tiles of a piece.
  template <class F>
  void for_tiles(int64_t unit, int64_t number, F&& f) const {
    const int64_t channel = unit % across * width;
    const int64_t own = std::min(width, norms.channels - channel);
    const int64_t height = norms.across() ? std::max<int64_t>(1, kTile / padded<A>(own)) : kTile;
    const int64_t end = std::min(norms.count(), (number + 1) * piece);
    for (int64_t e = number * piece; e < end; e += height)
      f(Tile{norms, unit / across, channel, own, e, std::min(end, e + height)});
  }
  // f(norm, number of it in the unit)
  template <class F>
  void for_norms(int64_t unit, F&& f) const {
    const int64_t channel = unit % across * width;
    for (int64_t j = 0; j < std::min(width, norms.channels - channel); ++j)
      f(unit / across * norms.channels + channel + j, j);
  }
  template <class F>
  void in_parallel(int64_t count, F&& f) const {
    const int64_t elements = std::max<int64_t>(1, width * std::min(piece, norms.count()));
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / elements),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) f(i);
                                });
  }
};

// write(tile) for all tiles.
template <class A, class Write>
void for_all_tiles(const Norms& norms, const Write& write) {
  const Cut<A> cut(norms);
  cut.in_parallel(cut.units * cut.pieces,
                  [&](int64_t i) { cut.for_tiles(i / cut.pieces, i % cut.pieces, write); });
}

// For each norm: sum(tile, sums, columns) of its tiles, finish(norm, its N sums), write(tile).
template <class A, int N, class Sum, class Finish, class Write>
void sum_then_write(const Norms& norms, const Sum& sum, const Finish& finish, const Write& write) {
  const Cut<A> cut(norms);
  const int64_t size = N * cut.columns();
  const auto conclude = [&](int64_t unit, const double* sums) {
    cut.for_norms(unit, [&](int64_t norm, int64_t j) {
      double own[N];
      for (int s = 0; s < N; ++s) own[s] = sums[s * cut.columns() + j];
      finish(norm, own);
    });
  };
  const auto add_up = [&](int64_t unit, int64_t piece, double* sums) {
    cut.for_tiles(unit, piece, [&](const Tile& tile) { sum(tile, sums, cut.columns()); });
  };
  if (cut.pieces == 1) {
    cut.in_parallel(cut.units, [&](int64_t unit) {
      double sums[N * kColumns];
      std::fill_n(sums, size, 0.0);
      add_up(unit, 0, sums);
      conclude(unit, sums);
      cut.for_tiles(unit, 0, write);
    });
    return;
  }
  std::vector<double> parts(cut.units * cut.pieces * size);
  cut.in_parallel(cut.units * cut.pieces, [&](int64_t i) {
    add_up(i / cut.pieces, i % cut.pieces, parts.data() + i * size);
  });
  for (int64_t unit = 0; unit < cut.units; ++unit) {
    double* first = parts.data() + unit * cut.pieces * size;
    for (int64_t i = size; i < cut.pieces * size; ++i) first[i % size] += first[i];
    conclude(unit, first);
  }
  for_all_tiles<A>(norms, write);
}

// The same for sums whose terms `sum` writes as it adds them: no second pass.
template <class A, int N, class Sum, class Finish>
void sum_norms(const Norms& norms, const Sum& sum, const Finish& finish) {
  sum_then_write<A, N>(norms, sum, finish, [](const Tile&) {});
}

}  // namespace aigc_fast

// One function of an element and of what its norm is, as a loop over a tile: it reads, computes,
// adds up and writes two vectors at a time, while the next elements come from memory.
#pragma once

#include "norm_tiles.h"
#include "sums.h"
#include "two_vectors.h"

namespace aigc_fast {

// Elements of a lane that meet in fp32 before fp64 takes over, side by side and along a norm. The
// sums decide every gradient of a channel: longer chains were 1.1 to 1.4 times over the error rule.
constexpr int kChain = 4, kChainAlong = 2;

// V numbers of each norm.
template <class A, int V>
class Values {
 public:
  explicit Values(int64_t norms) : stride_(norms + kExcess), of_(V * stride_) {}
  A* row(int k) { return of_.data() + k * stride_; }
  const A* row(int k) const { return of_.data() + k * stride_; }

 private:
  int64_t stride_;
  std::vector<A> of_;
};

// What is added up before it meets a norm's sums: vectors, or vectors in fp64.
template <class A>
AIGC_INLINE Wide<A> widen(const Wide<A>& v) {
  return v;
}

// Of two vectors in the order of load_pair<T> the first n elements, and zero in the others.
template <class T, class V>
AIGC_INLINE void keep_first(V& a, V& b, int n) {
  using A = Acc<T>;
  const int in_a = std::is_same_v<T, bf16> ? (n + 1) / 2 : std::min(n, kLanes<A>);
  a = only<A>(a, in_a);
  b = only<A>(b, n - in_a);
}
template <class A>
AIGC_INLINE Wide<A> only(Wide<A> v, int n) {
  for (int h = 0; h < Wide<A>::kHalves; ++h)
    v.half[h] = only<double>(v.half[h], n - h * kLanes<double>);
  return v;
}

template <class T>
AIGC_INLINE void pair_to_halves(Wide<Acc<T>>& a, Wide<Acc<T>>& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    for (int h = 0; h < 2; ++h)
      pair_to_halves(a.half[h], b.half[h], std::make_integer_sequence<int, kLanes<double>>{});
    std::swap(a.half[1], b.half[0]);
  }
}

// X tensors that are read and Y that are written, at one place.
template <class T, int X, int Y>
struct Places {
  std::array<const T*, X> in;
  std::array<T*, Y> out;

  Places at(int64_t i) const {
    Places moved = *this;
    for (const T*& p : moved.in) p += i;
    for (T*& p : moved.out) p += i;
    return moved;
  }
};

// Two vectors of elements, and what they add to N sums.
template <class T, int N, class Sum>
struct TilePair {
  static constexpr int64_t kPair = 2 * kLanes<Acc<T>>;
  Sum first[N + 1] = {}, second[N + 1] = {};

  // n elements at i; those `ahead` of them are asked for.
  template <int X, int Y, class P, class Count, class F>
  AIGC_INLINE void take(const Places<T, X, Y>& places, int64_t i, Count n, const P& p, const P& q,
                        int64_t ahead, const F& f) {
    constexpr bool whole = !std::is_same_v<Count, int64_t>;
    Vectors<Acc<T>, X> a, b;
    Vectors<Acc<T>, Y> c, d;
#pragma GCC unroll 4
    for (int k = 0; k < X; ++k) {
      ask_for<0>(places.in[k] + i + ahead, kPair);
      whole ? load_pair(places.in[k] + i, a[k], b[k]) : load_pair(places.in[k] + i, n, a[k], b[k]);
    }
    f(a, p, c, first);
    f(b, q, d, second);
#pragma GCC unroll 4
    for (int k = 0; k < Y; ++k) {
      ask_for<1>(places.out[k] + i + ahead, kPair);
      whole ? store_two(places.out[k] + i, c[k], d[k])
            : store_pair(places.out[k] + i, c[k], d[k], n);
    }
  }
};

// `count` elements of a norm, which goes on `next` elements behind their end.
template <class T, int N, class Sum, int X, int Y, int V, class F>
[[gnu::noinline]] void take_run(Places<T, X, Y> places, int64_t count, int64_t next,
                                const Vectors<Acc<T>, V>& values, Wide<Acc<T>>* totals, F f) {
  using A = Acc<T>;
  using S = TilePair<T, N, Sum>;
  // In fp64 there is no need of short chains.
  constexpr int64_t pair = S::kPair, chain = std::is_same_v<Sum, Vec<A>> ? kChainAlong : 64;
  constexpr int64_t ahead = kAhead<T>;
  const Vectors<A, V> p = values;
  const auto add = [&](const S& step) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k) {
      totals[k] += widen<A>(step.first[k]);
      totals[k] += widen<A>(step.second[k]);
    }
  };
  int64_t i = 0;
  for (const int64_t whole = count / pair * pair; i < whole;) {
    S step;
    const int64_t end = N ? std::min(whole, i + pair * chain) : whole;
    for (; i < end; i += pair)
      step.take(places, i, TwoVectors<A>{}, p, p, ahead + (i + ahead < count ? 0 : next), f);
    add(step);
  }
  if (const int64_t n = count - i) {
    S step;
    step.take(places, i, n, p, p, ahead + next, f);
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k) keep_first<T>(step.first[k], step.second[k], n);
    add(step);
  }
}

// `rows` elements of n norms, at most two vectors of them; as many follow.
template <class T, int N, class Sum, int V, int X, int Y, class Count, class F>
[[gnu::noinline]] void take_columns(Places<T, X, Y> places, Count n, int64_t rows, int64_t pitch,
                                    std::array<const Acc<T>*, V> values, double* sums,
                                    int64_t columns, F f) {
  using A = Acc<T>;
  constexpr std::integral_constant<int, kLanes<A>> lanes;
  Vectors<A, V> p, q;
#pragma GCC unroll 16
  for (int k = 0; k < V; ++k) {
    p[k] = load(values[k]), q[k] = load(values[k] + lanes);
    halves_to_pair<T>(p[k], q[k]);
  }
  const int64_t past = rows * pitch;
  for (int64_t i = 0; i < past;) {
    TilePair<T, N, Sum> step;
    const bool all = N == 0 || !std::is_same_v<Sum, Vec<A>>;
    const int64_t end = all ? past : std::min(past, i + kChain * pitch);
    for (; i < end; i += pitch) step.take(places, i, n, p, q, past, f);
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k) {
      pair_to_halves<T>(step.first[k], step.second[k]);
      double* to = sums + k * columns;
      add_to(to, widen<A>(step.first[k]), lanes);
      add_to(to + lanes, widen<A>(step.second[k]), lanes);
    }
  }
}

// f(x, values, y, sums) for the elements of a tile, a vector of each at a time: from X tensors to
// Y, with V values of the norm; what f adds to `sums` is added to N sums of each norm,
// sums[s * columns + j] for the j-th of the tile's norms.
template <int N, class Sum, class T, int X, int Y, int V, class F>
void map_tile(const Tile& tile, const Values<Acc<T>, V>& values, const Places<T, X, Y>& places,
              double* sums, int64_t columns, const F& f) {
  using A = Acc<T>;
  constexpr int64_t pair = TilePair<T, N, Sum>::kPair;
  if (!tile.norms.across()) {
    for (int64_t j = 0; j < tile.width; ++j) {
      Vectors<A, V> p;
      for (int k = 0; k < V; ++k) p[k] = broadcast(values.row(k)[tile.norm() + j]);
      Wide<A> totals[N + 1];
      tile.for_runs(j, [&](int64_t at, int64_t count, int64_t next) {
        take_run<T, N, Sum>(places.at(at), count, next, p, totals, f);
      });
      for (int k = 0; k < N; ++k) sums[k * columns + j] += totals[k].sum();
    }
    return;
  }
  const int64_t rows = tile.last - tile.first, pitch = tile.norms.channels;
  for (int64_t j = 0; j < tile.width; j += pair) {
    std::array<const A*, V> at;
    for (int k = 0; k < V; ++k) at[k] = values.row(k) + tile.norm() + j;
    const auto take = [&](auto n) {
      take_columns<T, N, Sum, V>(places.at(tile.place(tile.first) + j), n, rows, pitch, at,
                                 sums + j, columns, f);
    };
    const int64_t n = tile.width - j;
    n < pair ? take(n) : take(TwoVectors<A>{});
  }
}
template <int N = 0, class T, int X, int Y, int V, class F>
void map_tile(const Tile& tile, const Values<Acc<T>, V>& values, const Places<T, X, Y>& places,
              double* sums, int64_t columns, const F& f) {
  map_tile<N, Vec<Acc<T>>>(tile, values, places, sums, columns, f);
}
template <class T, int X, int Y, int V, class F>
void map_tile(const Tile& tile, const Values<Acc<T>, V>& values, const Places<T, X, Y>& places,
              const F& f) {
  map_tile<0>(tile, values, places, nullptr, 0, f);
}

}  // namespace aigc_fast

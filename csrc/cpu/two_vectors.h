// Element-wise maps and sums, along rows and down columns, two vectors at a time.
//
// For bf16 the two are the even and the odd elements of one 64-byte load: widening takes one
// instruction each and narrowing five, against two and eleven of load() and store().
#pragma once

#include <algorithm>
#include <array>

#include "vector_pair.h"

namespace aigc_fast {

// std::array would forget that its elements are vectors.
template <class A, int N>
struct Vectors {
  Vec<A> at[N > 0 ? N : 1];
  AIGC_INLINE Vec<A>& operator[](size_t i) { return at[i]; }
  AIGC_INLINE const Vec<A>& operator[](size_t i) const { return at[i]; }
};

template <class A>
using TwoVectors = std::integral_constant<int, 2 * kLanes<A>>;

// Where a number goes that lies half-way between two of bf16: to the even one of them, as in
// torch, or away from zero, which takes 3 instructions in place of 9. An activation does not meet
// such numbers but by the accident of its own last bits.
enum class Ties { even, away };

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// The upper halves of the lanes of a and b, in turns.
AIGC_INLINE Words upper_halves(Words a, Words b) {
#if defined(__AVX512BW__)
  const auto which = lane_numbers<float>([](int i) { return (2 * i + 33) << 16 | (2 * i + 1); });
  return (Words)_mm512_permutex2var_epi16((__m512i)a, (__m512i)which, (__m512i)b);
#else
  return a >> 16 | (b & 0xffff0000u);
#endif
}

// load_pair's counterpart. A NaN must have its low 16 bits zero, as one that comes from bf16
// tensors or from arithmetic on them has: rounding cannot carry it to infinity then.
template <class T, Ties ties = Ties::even, class V = Vec<Acc<T>>>
AIGC_INLINE void store_two(T* p, V a, V b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto round = [](V v) __attribute__((always_inline)) {
      const Words x = reinterpret_cast<Words>(v);
      return x + (ties == Ties::even ? 0x7fffu + (x >> 16 & 1u) : Words{} + 0x8000u);
    };
    const Words both = upper_halves(round(a), round(b));
    std::memcpy(static_cast<void*>(p), &both, sizeof both);
  } else {
    store(p, a);
    store(p + kLanes<Acc<T>>, b);
  }
}

// Two vectors in the order of load_pair, or with any `lanes` but TwoVectors one, and zero.
template <class T, class N>
AIGC_INLINE Vectors<Acc<T>, 2> load_two(const T* p, N lanes) {
  Vectors<Acc<T>, 2> v = {};
  if constexpr (std::is_same_v<N, TwoVectors<Acc<T>>>)
    load_pair(p, v[0], v[1]);
  else
    v[0] = load(p, lanes);
  return v;
}
template <class T, class N>
AIGC_INLINE void store_two(T* p, const Vectors<Acc<T>, 2>& v, N lanes) {
  if constexpr (std::is_same_v<N, TwoVectors<Acc<T>>>)
    store_two(p, v[0], v[1]);
  else
    store(p, v[0], lanes);
}

// Asks for the lines of p[0], ..., p[count - 1].
template <int write, class T>
AIGC_INLINE void ask_for(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i, write);
}
// How far ahead of what is read or written that is done along a row: prefetchers stop at a page's
// end, and a store whose line is not in the cache holds up the stores behind it.
template <class T>
constexpr int64_t kAhead = 2048 / sizeof(T);

// out[i] = f({x[0][i], ..., params[0][i], ...}) for a row of `count` elements; params are in the
// cache, and in the order in which load_pair<T> gives x. What lies `ahead` elements behind those of
// x is asked for meanwhile.
template <class T, int X, int P = 0, Ties ties = Ties::even, class F>
AIGC_INLINE void map_row(int64_t count, std::array<const T*, X> x, T* out, F&& f,
                         std::array<const Acc<T>*, P> params = {}, int64_t ahead = kAhead<T>) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    Vectors<A, X + P> a, b;
    for (int k = 0; k < X; ++k) {
      ask_for<0>(x[k] + i + ahead, 2 * lanes);
      load_pair(x[k] + i, a[k], b[k]);
    }
    for (int k = 0; k < P; ++k) load_pair(params[k] + i, a[X + k], b[X + k]);
    ask_for<1>(out + i + kAhead<T>, 2 * lanes);
    store_two<T, ties>(out + i, f(a), f(b));
  }
  for_vectors<A>(count - i, [&](int64_t j, auto n) {
    Vectors<A, X + P> a;
    for (int k = 0; k < X; ++k) a[k] = load(x[k] + i + j, n);
    for (int k = 0; k < P; ++k) a[X + k] = load(params[k] + i + j, n);
    store(out + i + j, f(a), n);
  });
}

// out[n][i] = f(at)[n] for i < count, where at(p) is p[i]; null pointers in `out` are left alone.
// The outputs must not overlap what f reads.
template <class T, int N, class F>
AIGC_INLINE void map_at(int64_t count, std::array<T*, N> out, F&& f) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    // Each load is written twice; the compiler makes one of the two.
    const Vectors<A, N> a = f([i](const T* p) {
      Vec<A> v, w;
      load_pair(p + i, v, w);
      return v;
    });
    const Vectors<A, N> b = f([i](const T* p) {
      Vec<A> v, w;
      load_pair(p + i, v, w);
      return w;
    });
#pragma GCC unroll 4  // else the results stay in memory
    for (int n = 0; n < N; ++n)
      if (out[n]) {
        ask_for<1>(out[n] + i + kAhead<T>, 2 * lanes);
        store_two(out[n] + i, a.at[n], b.at[n]);
      }
  }
  for_vectors<A>(count - i, [&](int64_t j, auto lanes) {
    const Vectors<A, N> a = f([&](const T* p) { return load(p + i + j, lanes); });
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      if (out[n]) store(out[n] + i + j, a.at[n], lanes);
  });
}

// The N sums along a row that f({x[0][i], ..., params[0][i], ...}, sums) adds to, in four chains of
// additions; past the end of the row x[0] is `fill` and the others are 0, for which f must add
// nothing. params: as in map_row.
template <class T, int N, int X, int P = 0, class F>
AIGC_INLINE std::array<Acc<T>, N> sum_row(int64_t count, std::array<const T*, X> x, Acc<T> fill,
                                          F&& f, std::array<const Acc<T>*, P> params = {}) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[4][N] = {};
  const auto add = [&](int64_t at, Vec<A>* first, Vec<A>* second) __attribute__((always_inline)) {
    Vectors<A, X + P> a, b;
    for (int k = 0; k < X; ++k) {
      ask_for<0>(x[k] + at + kAhead<T>, 2 * lanes);
      load_pair(x[k] + at, a[k], b[k]);
    }
    for (int k = 0; k < P; ++k) load_pair(params[k] + at, a[X + k], b[X + k]);
    f(a, first);
    f(b, second);
  };
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    add(i, sums[0], sums[1]);
    add(i + 2 * lanes, sums[2], sums[3]);
  }
  if (i + 2 * lanes <= count) {
    add(i, sums[0], sums[1]);
    i += 2 * lanes;
  }
  for_vectors<A>(count - i, [&](int64_t j, auto n) {
    Vectors<A, X + P> a;
    for (int k = 0; k < X; ++k) a[k] = load(x[k] + i + j, n);
    for (int k = 0; k < P; ++k) a[X + k] = load(params[k] + i + j, n);
    for (int lane = n; lane < lanes; ++lane) a[0][lane] = fill;
    f(a, sums[0]);
  });
  std::array<A, N> total;
  for (int s = 0; s < N; ++s)
    total[s] = sum_lanes<A>((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
  return total;
}

// Calls f(first column, lanes, params of the first vector, of the second) for all columns, two
// vectors at a time and in the end one, whose `lanes` is then no multiple of two vectors.
template <class T, int P, class F>
AIGC_INLINE void for_columns(int64_t width, std::array<const Acc<T>*, P> params, F&& f) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  Vectors<A, P> a = {}, b = {};
  int64_t j = 0;
  for (; j + 2 * lanes <= width; j += 2 * lanes) {
    for (int k = 0; k < P; ++k) {
      a[k] = load(params[k] + j), b[k] = load(params[k] + j + lanes);
      halves_to_pair<T>(a[k], b[k]);
    }
    f(j, TwoVectors<A>{}, a, b);
  }
  for_vectors<A>(width - j, [&](int64_t i, auto n) {
    for (int k = 0; k < P; ++k) a[k] = load(params[k] + j + i, n);
    f(j + i, n, a, b);
  });
}

// out[r][j] = f({x[0][r][j], ...}, {params[0][j], ...}). As many rows are asked for as follow.
template <class T, int X, int P, Ties ties = Ties::even, class F>
AIGC_INLINE void map_columns(int64_t rows, int64_t width, std::array<const T*, X> x,
                             std::array<const Acc<T>*, P> params, T* out, F&& f) {
  using A = Acc<T>;
  for_columns<T, P>(width, params, [&](int64_t j, auto n, const auto& p, const auto& q) {
    for (int64_t at = j; at < j + rows * width; at += width) {
      Vectors<A, X> a, b;
      if constexpr (std::is_same_v<decltype(n), TwoVectors<A>>) {
        for (int k = 0; k < X; ++k) {
          ask_for<0>(x[k] + at + rows * width, n);
          load_pair(x[k] + at, a[k], b[k]);
        }
        ask_for<1>(out + at + rows * width, n);
        store_two<T, ties>(out + at, f(a, p), f(b, q));
      } else {
        for (int k = 0; k < X; ++k) a[k] = load(x[k] + at, n);
        store(out + at, f(a, p), n);
      }
    }
  });
}

// out[k * width + j] = the sum over rows of what f({x[0][r][j], ...}, {params[0][j], ...}, sums)
// adds to sums[k]. Runs of 8 rows are added before they meet the rest: a third of the rounding
// error of one chain.
template <class T, int N, int X, int P, class F>
AIGC_INLINE void sum_columns(int64_t rows, int64_t width, std::array<const T*, X> x,
                             std::array<const Acc<T>*, P> params, Acc<T>* out, F&& f) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  for_columns<T, P>(width, params, [&](int64_t j, auto n, const auto& p, const auto& q) {
    Vec<A> sums[2][N] = {};
    for (int64_t r = 0; r < rows; r += 8) {
      Vec<A> run[2][N] = {};
      const int64_t end = j + std::min(r + 8, rows) * width;
      for (int64_t at = j + r * width; at < end; at += width) {
        Vectors<A, X> a, b;
        if constexpr (std::is_same_v<decltype(n), TwoVectors<A>>) {
          for (int k = 0; k < X; ++k) {
            ask_for<0>(x[k] + at + rows * width, n);
            load_pair(x[k] + at, a[k], b[k]);
          }
          f(b, q, run[1]);
        } else {
          for (int k = 0; k < X; ++k) a[k] = load(x[k] + at, n);
        }
        f(a, p, run[0]);
      }
      for (int k = 0; k < N; ++k) sums[0][k] += run[0][k], sums[1][k] += run[1][k];
    }
    for (int k = 0; k < N; ++k) {
      A* to = out + k * width + j;
      if constexpr (std::is_same_v<decltype(n), TwoVectors<A>>) {
        pair_to_halves<T>(sums[0][k], sums[1][k]);
        store(to, sums[0][k]);
        store(to + lanes, sums[1][k]);
      } else {
        store(to, sums[0][k], n);
      }
    }
  });
}

}  // namespace aigc_fast

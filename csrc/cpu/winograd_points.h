// Winograd's minimal filtering: fewer products for a tile of outputs than one for each weight.
//
//   y = A' [ (G w G') * (B' x B) ] A      Lavin and Gray, arXiv:1509.09308
//
// x is the tile, y its 2x2 outputs by 3x3 weights from 16 products in place of 36, or its 2x4
// outputs by 2x2 weights from 15 in place of 32; * multiplies each position by itself, and summed
// over channels that is a matrix product for each position. An infinity makes NaN.
#pragma once

#include "vectors.h"

namespace aigc_fast {

template <class V>
using Element = std::remove_cvref_t<decltype(V{}[0])>;

// Products of polynomials at the points 0, 1, -1 and infinity: two outputs of three weights.
struct FourPoints {
  static constexpr int kPoints = 4, kOutputs = 2, kTaps = 3;

  struct Input {  // B' x
    static constexpr int kFrom = kPoints, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&x)[4], V (&to)[4]) {
      to[0] = x[0] - x[2];
      to[1] = x[1] + x[2];
      to[2] = x[2] - x[1];
      to[3] = x[1] - x[3];
    }
  };

  struct Weight {  // G w
    static constexpr int kFrom = kTaps, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&w)[3], V (&to)[4]) {
      const V even = w[0] + w[2];
      to[0] = w[0];
      to[1] = (even + w[1]) * 0.5f;
      to[2] = (even - w[1]) * 0.5f;
      to[3] = w[2];
    }
  };

  struct Output {  // A' m
    static constexpr int kFrom = kPoints, kTo = kOutputs;
    template <class V>
    AIGC_INLINE static void apply(const V (&m)[4], V (&to)[2]) {
      to[0] = m[0] + (m[1] + m[2]);
      to[1] = (m[1] - m[2]) - m[3];
    }
  };

  struct GradOutput {  // A y
    static constexpr int kFrom = kOutputs, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&y)[2], V (&to)[4]) {
      to[0] = y[0];
      to[1] = y[0] + y[1];
      to[2] = y[0] - y[1];
      to[3] = -y[1];
    }
  };

  struct GradWeight {  // G' u
    static constexpr int kFrom = kPoints, kTo = kTaps;
    template <class V>
    AIGC_INLINE static void apply(const V (&u)[4], V (&to)[3]) {
      const V even = (u[1] + u[2]) * 0.5f;
      to[0] = u[0] + even;
      to[1] = (u[1] - u[2]) * 0.5f;
      to[2] = even + u[3];
    }
  };
};

// At 1/2, -1/2 and infinity: two outputs of two weights.
struct ThreePoints {
  static constexpr int kPoints = 3, kOutputs = 2, kTaps = 2;

  struct Input {
    static constexpr int kFrom = kPoints, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&x)[3], V (&to)[3]) {
      const V even = x[0] * 0.5f;
      to[0] = even + x[1];
      to[1] = even - x[1];
      to[2] = x[2] - x[0] * 0.25f;
    }
  };

  struct Weight {
    static constexpr int kFrom = kTaps, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&w)[2], V (&to)[3]) {
      const V odd = w[1] * 0.5f;
      to[0] = w[0] + odd;
      to[1] = w[0] - odd;
      to[2] = w[1];
    }
  };

  struct Output {
    static constexpr int kFrom = kPoints, kTo = kOutputs;
    template <class V>
    AIGC_INLINE static void apply(const V (&m)[3], V (&to)[2]) {
      to[0] = m[0] + m[1];
      to[1] = (m[0] - m[1]) * 0.5f + m[2];
    }
  };

  // As many outputs as weights: the gradients are made as they are.
  using GradOutput = Weight;
  using GradWeight = Output;
};

// At p, -p, q, -q and infinity: four outputs of two weights. Of five points near these the least of
// the products' rounding errors reaches the outputs, two thirds of what 0, 1, -1, 2 and infinity
// let through. Five points in both directions are more than twice as wrong as plain sums.
struct FivePoints {
  static constexpr int kPoints = 5, kOutputs = 4, kTaps = 2;
  static constexpr double p = 1.25, q = 0.375, pp = p * p, qq = q * q;
  // 1 / product of the point's distances from the others
  static constexpr double fp = 0.5 / (p * (pp - qq)), fq = 0.5 / (q * (pp - qq));

  struct Input {
    static constexpr int kFrom = kPoints, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&x)[5], V (&to)[5]) {
      using A = Element<V>;
      const V even_p = (x[2] - x[0] * A(qq)) * A(p), odd_p = x[3] - x[1] * A(qq);
      const V even_q = (x[0] * A(pp) - x[2]) * A(q), odd_q = x[1] * A(pp) - x[3];
      to[0] = even_p + odd_p;
      to[1] = even_p - odd_p;
      to[2] = even_q + odd_q;
      to[3] = even_q - odd_q;
      to[4] = x[4] + x[0] * A(pp * qq) - x[2] * A(pp + qq);
    }
  };

  struct Weight {
    static constexpr int kFrom = kTaps, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&w)[2], V (&to)[5]) {
      using A = Element<V>;
      const V even_p = w[0] * A(fp), odd_p = w[1] * A(p * fp);
      const V even_q = w[0] * A(fq), odd_q = w[1] * A(q * fq);
      to[0] = even_p + odd_p;
      to[1] = even_p - odd_p;
      to[2] = even_q + odd_q;
      to[3] = even_q - odd_q;
      to[4] = w[1];
    }
  };

  struct Output {
    static constexpr int kFrom = kPoints, kTo = kOutputs;
    template <class V>
    AIGC_INLINE static void apply(const V (&m)[5], V (&to)[4]) {
      using A = Element<V>;
      const V even_p = m[0] + m[1], even_q = m[2] + m[3];
      const V odd_p = (m[0] - m[1]) * A(p), odd_q = (m[2] - m[3]) * A(q);
      to[0] = even_p + even_q;
      to[1] = odd_p + odd_q;
      to[2] = even_p * A(pp) + even_q * A(qq);
      to[3] = odd_p * A(pp) + odd_q * A(qq) + m[4];
    }
  };

  struct GradOutput {
    static constexpr int kFrom = kOutputs, kTo = kPoints;
    template <class V>
    AIGC_INLINE static void apply(const V (&y)[4], V (&to)[5]) {
      using A = Element<V>;
      const V even_p = y[0] + y[2] * A(pp), odd_p = (y[1] + y[3] * A(pp)) * A(p);
      const V even_q = y[0] + y[2] * A(qq), odd_q = (y[1] + y[3] * A(qq)) * A(q);
      to[0] = even_p + odd_p;
      to[1] = even_p - odd_p;
      to[2] = even_q + odd_q;
      to[3] = even_q - odd_q;
      to[4] = y[3];
    }
  };

  struct GradWeight {
    static constexpr int kFrom = kPoints, kTo = kTaps;
    template <class V>
    AIGC_INLINE static void apply(const V (&u)[5], V (&to)[2]) {
      using A = Element<V>;
      to[0] = (u[0] + u[1]) * A(fp) + (u[2] + u[3]) * A(fq);
      to[1] = (u[0] - u[1]) * A(p * fp) + (u[2] - u[3]) * A(q * fq) + u[4];
    }
  };
};

// Columns, then rows, of vectors of channels: get(row, column) to put(row, column, vector).
template <class Down, class Across, class A, class Get, class Put>
AIGC_INLINE void both_ways(Get&& get, Put&& put) {
  Vec<A> from[Across::kFrom], to[Across::kTo], half[Across::kFrom][Down::kTo];
#pragma GCC unroll 5
  for (int x = 0; x < Across::kFrom; ++x) {
    Vec<A> column[Down::kFrom];
#pragma GCC unroll 5
    for (int y = 0; y < Down::kFrom; ++y) column[y] = get(y, x);
    Down::apply(column, half[x]);
  }
#pragma GCC unroll 5
  for (int y = 0; y < Down::kTo; ++y) {
#pragma GCC unroll 5
    for (int x = 0; x < Across::kFrom; ++x) from[x] = half[x][y];
    Across::apply(from, to);
#pragma GCC unroll 5
    for (int x = 0; x < Across::kTo; ++x) put(y, x, to[x]);
  }
}

}  // namespace aigc_fast

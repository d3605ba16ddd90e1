// Rotary position embedding of one token's heads: each pair of features turned by an angle.
//
// The pair is (i, i + r / 2) or, interleaved, (2i, 2i + 1). All heads of a token share its angles.
#pragma once

#include <vector>

#include "rows.h"
#include "two_vectors.h"

namespace aigc_fast {

// (first, second) -> (first c - second s, second c + first s) with the halves of a head as the
// two; `sign` is -1 to turn back. Inlined by force, as its counterpart below: a call for each head
// would cost 15%.
template <class T, class Y, class C>
AIGC_INLINE void rotate_halves(const T* x, Y* y, const C* cos, const C* sin, Acc<T> sign,
                               int64_t half) {
  using V = Vec<Acc<T>>;
  int64_t done = 0;
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<Y, T> && std::is_same_v<C, T>) {
    constexpr int step = 2 * kLanes<Acc<T>>;
    for (; done + step <= half; done += step) {
      V c[2], s[2], first[2], second[2];
      load_pair(cos + done, c[0], c[1]), load_pair(sin + done, s[0], s[1]);
      load_pair(x + done, first[0], first[1]), load_pair(x + half + done, second[0], second[1]);
      s[0] *= sign, s[1] *= sign;
      store_two(y + done, first[0] * c[0] - second[0] * s[0], first[1] * c[1] - second[1] * s[1]);
      store_two(y + half + done, second[0] * c[0] + first[0] * s[0],
                second[1] * c[1] + first[1] * s[1]);
    }
  }
  for_vectors<Acc<T>>(half - done, [&](int64_t j, auto lanes) {
    const int64_t i = done + j;
    const V c = load(cos + i, lanes), s = load(sin + i, lanes) * sign;
    const V first = load(x + i, lanes), second = load(x + half + i, lanes);
    store(y + i, first * c - second * s, lanes);
    store(y + half + i, second * c + first * s, lanes);
  });
}

// table[2i] = sign_even * p[i] * sign, table[2i + 1] = p[i] * sign; writes whole vectors.
template <class A, class C>
void spread_pairs(const C* p, A* table, A sign_even, A sign, int64_t half) {
  constexpr int lanes = kLanes<A>;
  const Vec<Bits<A>> low = lane_numbers<A>([](int i) { return i / 2; });
  const Vec<Bits<A>> high = low + lanes / 2;
  Vec<A> signs = broadcast(sign);
  for (int i = 0; i < lanes; i += 2) signs[i] *= sign_even;
  for_vectors<A>(half, [&](int64_t i, auto n) {
    const Vec<A> v = load(p + i, n);
    store(table + 2 * i, __builtin_shuffle(v, low) * signs);
    store(table + 2 * i + lanes, __builtin_shuffle(v, high) * signs);
  });
}

// With neighbours as the pair: y[i] = x[i] * cos[i] + x[i ^ 1] * sin[i], sin negative at even i.
template <class T, class Y>
AIGC_INLINE void rotate_neighbours(const T* x, Y* y, const Acc<T>* cos, const Acc<T>* sin,
                                   int64_t rotated) {
  using A = Acc<T>;
  const Vec<Bits<A>> swapped = lane_numbers<A>([](int i) { return i ^ 1; });
  for_vectors<A>(rotated, [&](int64_t i, auto lanes) {
    const Vec<A> v = load(x + i, lanes);
    const Vec<A> partner = __builtin_shuffle(v, swapped);
    store(y + i, v * load(cos + i, lanes) + partner * load(sin + i, lanes), lanes);
  });
}

// Refuses angles that are not of x (batch, seq, heads, head_dim).
inline void check_angles(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t dims = cos.dim();
  require(dims == 2 || dims == 3, "cos must have 2 or 3 dimensions");
  require(same_shape(cos, sin), "sin must have the shape of cos");
  require(dims == 2 || cos.size(0) == x.size(0), "cos must have the batch size of x");
  require(cos.size(dims - 2) == x.size(1), "cos must have the sequence length of x");
  require(2 * cos.size(dims - 1) <= x.size(3), "cos must be at most half of head_dim wide");
  const ScalarType dtype = x.scalar_type(), angles = cos.scalar_type();
  require(angles == dtype || (angles == ScalarType::Float && dtype != ScalarType::Double),
          "cos must be float32 or have the dtype of x");
  require(sin.scalar_type() == angles, "sin must have the dtype of cos");
}

// Turns the heads of one token after another. C is the type of the angles, A of the arithmetic.
template <class A, class C>
class Rotation {
 public:
  // The last dimension of cos and sin must be contiguous.
  Rotation(const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse)
      : cos_(cos),
        sin_(sin),
        half_(cos.size(cos.dim() - 1)),
        padded_((half_ + kLanes<A> - 1) / kLanes<A> * kLanes<A> * 2),
        sign_(inverse ? -1 : 1),
        table_(interleaved ? 2 * padded_ : 0) {}

  int64_t width() const { return 2 * half_; }

  // Calls f(turn) with turn(x, y) rotating the first width() features of a head of that token; y
  // may be x.
  template <class F>
  void at(int64_t batch, int64_t token, F&& f) {
    const C *cos = cos_.at(batch, token), *sin = sin_.at(batch, token);
    if (table_.empty())
      return f([cos, sin, sign = sign_, half = half_](const auto* x, auto* y) {
        rotate_halves(x, y, cos, sin, sign, half);
      });
    A *cosines = table_.data(), *sines = cosines + padded_;
    spread_pairs<A>(cos, cosines, A(1), A(1), half_);
    spread_pairs<A>(sin, sines, A(-1), sign_, half_);
    f([cosines, sines, width = width()](const auto* x, auto* y) {
      rotate_neighbours(x, y, cosines, sines, width);
    });
  }

 private:
  struct Angles {
    const C* data;
    int64_t batch, token;
    explicit Angles(const Tensor& table)
        : data(aigc_fast::data<C>(table)),
          batch(table.dim() == 3 ? table.stride(0) : 0),
          token(table.stride(table.dim() - 2)) {}
    const C* at(int64_t b, int64_t t) const { return data + b * batch + t * token; }
  };

  Angles cos_, sin_;
  int64_t half_, padded_;
  A sign_;
  std::vector<A> table_;  // of interleaved pairs, empty otherwise
};

}  // namespace aigc_fast

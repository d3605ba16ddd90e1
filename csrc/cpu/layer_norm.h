// The adaLN chain of a diffusion transformer: residual + gate * x, its LayerNorm or RMSNorm, and
// the modulation by scale and shift. What its directions have in common.
//
// Rows of the modulation serve runs of `run` neighbouring rows of x. A row is looked at several
// times, all but the first in the L1 cache. Backward finds the statistics anew, so that forward
// has nothing to save beside its input.
#pragma once

#include "rows.h"
#include "two_vectors.h"

namespace aigc_fast {

// A row for every row of the modulation: that of a tensor, or one constant row.
inline Rows modulation_rows(const MaybeTensor& p, const Tensor& x, int64_t count, double missing) {
  if (p) return as_rows(*p);
  const int64_t width = x.size(x.dim() - 1);
  Tensor row = empty({width}, x.scalar_type());
  dispatch(x, "x", [&]<class T>(T) {
    for (int64_t i = 0; i < width; ++i) store_one(mutable_data<T>(row) + i, Acc<T>(missing));
  });
  return {row, count, width, 0};
}

// How many rows the modulation has; 1 where there is none.
inline int64_t count_modulation(const Tensor& x, std::initializer_list<const MaybeTensor*> all) {
  require(x.dim() > 0, "x must have at least 1 dimension");
  const int64_t width = x.size(x.dim() - 1);
  const Tensor* first = nullptr;
  for (const MaybeTensor* p : all) {
    if (!*p) continue;
    if (!first) first = &**p;
    require(same_shape(**p, *first) && (*p)->scalar_type() == x.scalar_type(),
            "scale, shift and gate must have one shape and the dtype of x");
  }
  if (!first) return 1;
  require(x.dim() > 1 && (first->dim() == 2 || first->dim() == 3), "wrong number of dimensions");
  require(first->size(0) == x.size(0) && first->size(first->dim() - 1) == width,
          "scale, shift and gate must have the batch and width of x");
  int64_t tokens = 1;
  for (int64_t d = 1; d + 1 < x.dim(); ++d) tokens *= x.size(d);
  const int64_t frames = first->dim() == 3 ? first->size(1) : 1;
  require(frames == tokens || (frames > 0 && tokens % frames == 0), "frames must divide tokens");
  return x.size(0) * frames;
}

inline void check_affine(const MaybeTensor& p, const Tensor& x) {
  require(!p || (p->dim() == 1 && p->size(0) == x.size(x.dim() - 1) &&
                 p->scalar_type() == x.scalar_type()),
          "weight and bias must have the width and dtype of x");
}

// Mean and 1 / deviation of a row, and the sums over it that f(differences from the mean, other
// vectors, sums) adds to; the first of the rows x is that of the mean. Two looks: the mean's
// rounding is made good with the sum of the differences from it.
template <class A, int N>
struct Statistics {
  A mean, factor, rest;
  std::array<A, N + 2> sums;
};
template <class T, bool rms, int N, int X, class F>
AIGC_INLINE Statistics<Acc<T>, N> statistics(std::array<const T*, X> x, int64_t width, double eps,
                                             F&& f) {
  using A = Acc<T>;
  A mean = 0;
  if constexpr (!rms)
    mean = sum_row<T, 1, 1>(width, {x[0]}, 0, [](auto& v, Vec<A>* s) { s[0] += v[0]; })[0] / width;
  // Past the end of the row everything is the mean: no difference, and f must add nothing for it.
  const auto sums = sum_row<T, N + 2, X>(width, x, mean, [&](auto& v, Vec<A>* s) {
    const Vec<A> d = rms ? v[0] : v[0] - mean;
    if constexpr (!rms) s[0] += d;
    s[1] += d * d;
    f(d, v, s + 2);
  });
  const A rest = sums[0] / width;
  const A variance = sums[1] / width - rest * rest;
  return {mean + rest, 1 / std::sqrt(variance + A(eps)), rest, sums};
}

template <class F>
void with_flags(bool a, bool b, F&& f) {
  a ? (b ? f.template operator()<true, true>() : f.template operator()<true, false>())
    : (b ? f.template operator()<false, true>() : f.template operator()<false, false>());
}

}  // namespace aigc_fast

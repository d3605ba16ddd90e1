// The adaLN chain of a diffusion transformer: residual + gate * x, its LayerNorm or RMSNorm, and
// the modulation by scale and shift. What its directions have in common.
//
// Rows of the modulation serve runs of `run` neighbouring rows of x; the norm's own weight and bias
// are multiplied into them once for a run. Backward finds the statistics anew, so that forward has
// nothing to save beside its input.
#pragma once

#include "kept_buffer.h"
#include "row_moments.h"
#include "rows.h"

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

// to[n][j] = f({rows[0][j], rows[1][j], ...})[n], in the order in which load_pair gives rows.
template <class T, int N, int X, class F>
AIGC_INLINE void prepare(int64_t width, std::array<const T*, X> rows, std::array<Acc<T>*, N> to,
                         F&& f) {
  using A = Acc<T>;
  for_columns<T, 0>(width, {}, [&](int64_t j, auto n, auto&, auto&) {
    Vectors<A, 2> out[N] = {};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vectors<A, X> v;
      for (int k = 0; k < X; ++k) v[k] = load_two(rows[k] + j, n)[half];
      const Vectors<A, N> made = f(v);
      for (int k = 0; k < N; ++k) out[k][half] = made[k];
    }
    for (int k = 0; k < N; ++k) store_two(to[k] + j, out[k], n);
  });
}

template <class F>
void with_flags(bool a, bool b, F&& f) {
  a ? (b ? f.template operator()<true, true>() : f.template operator()<true, false>())
    : (b ? f.template operator()<false, true>() : f.template operator()<false, false>());
}

}  // namespace aigc_fast

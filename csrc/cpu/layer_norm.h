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
inline Rows modulation_rows(const MaybeTensor& p, ScalarType dtype, int64_t count, int64_t width,
                            double missing) {
  if (p) return as_rows(*p);
  Tensor row = empty({width}, dtype);
  dispatch(row, "x", [&]<class T>(T) {
    for (int64_t i = 0; i < width; ++i) store_one(mutable_data<T>(row) + i, Acc<T>(missing));
  });
  return {row, count, width, 0};
}

// What scale, shift and gate have in common.
struct Modulation {
  int64_t count = 1;  // rows; 1 where there is none
  ScalarType dtype;   // that of x, or fp32 beside 16 bits

  Modulation(const Tensor& x, std::initializer_list<const MaybeTensor*> all)
      : dtype(x.scalar_type()) {
    require(x.dim() > 0, "x must have at least 1 dimension");
    const int64_t width = x.size(x.dim() - 1);
    const Tensor* first = nullptr;
    for (const MaybeTensor* p : all) {
      if (!*p) continue;
      if (!first) first = &**p, dtype = first->scalar_type();
      require(same_shape(**p, *first) && (*p)->scalar_type() == dtype,
              "scale, shift and gate must have one shape and dtype");
    }
    if (!first) return;
    require(dtype == x.scalar_type() || dtype == acc_dtype(x),
            "scale, shift and gate must have the dtype of x, or float32 beside 16 bits");
    require(x.dim() > 1 && (first->dim() == 2 || first->dim() == 3), "wrong number of dimensions");
    require(first->size(0) == x.size(0) && first->size(first->dim() - 1) == width,
            "scale, shift and gate must have the batch and width of x");
    int64_t tokens = 1;
    for (int64_t d = 1; d + 1 < x.dim(); ++d) tokens *= x.size(d);
    const int64_t frames = first->dim() == 3 ? first->size(1) : 1;
    require(frames == tokens || (frames > 0 && tokens % frames == 0), "frames must divide tokens");
    count = x.size(0) * frames;
  }

  // dispatch() of x with the modulation's type beside it.
  template <class F>
  void dispatch_with(const Tensor& x, F&& f) const {
    dispatch(x, "x", [&]<class T>(T t) {
      if constexpr (!std::is_same_v<T, Acc<T>>)
        if (dtype != x.scalar_type()) return f(t, Acc<T>{});
      f(t, t);
    });
  }
};

inline void check_affine(const MaybeTensor& p, const Tensor& x) {
  require(!p || (p->dim() == 1 && p->size(0) == x.size(x.dim() - 1) &&
                 p->scalar_type() == x.scalar_type()),
          "weight and bias must have the width and dtype of x");
}

// to[n][j] = f({own[0][j], ..., rows[0][j], ...})[n], in the order in which load_pair<T> gives
// rows; those of the modulation are M.
template <class T, class M, int N, int P, int X, class F>
AIGC_INLINE void prepare(int64_t width, std::array<const T*, P> own, std::array<const M*, X> rows,
                         std::array<Acc<T>*, N> to, F&& f) {
  using A = Acc<T>;
  const auto as_pair = [](const M* p, auto n) __attribute__((always_inline)) {
    Vectors<A, 2> v = load_two(p, n);
    if (!std::is_same_v<T, M> && std::is_same_v<decltype(n), TwoVectors<A>>)
      halves_to_pair<T>(v[0], v[1]);
    return v;
  };
  for_columns<T, 0>(width, {}, [&](int64_t j, auto n, auto&, auto&) {
    Vectors<A, 2> out[N] = {};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vectors<A, P + X> v;
      for (int k = 0; k < P; ++k) v[k] = load_two(own[k] + j, n)[half];
      for (int k = 0; k < X; ++k) v[P + k] = as_pair(rows[k] + j, n)[half];
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

// Groups of rows, each with a weight of its own.
#include "linear_product.h"

namespace aigc_fast {
namespace {

// Where each group ends.
struct Groups {
  std::vector<int64_t> bounds;

  Groups(const Tensor& given, int64_t rows) : bounds(1) {
    require(given.dim() == 1 && given.scalar_type() == ScalarType::Int,
            "ends must be int32 with one dimension");
    const Tensor ends = as_contiguous(given);
    for (int64_t g = 0; g < ends.size(0); ++g) {
      bounds.push_back(data<int32_t>(ends)[g]);
      require(bounds[g] <= bounds[g + 1] && bounds[g + 1] <= rows,
              "ends must not fall and end at the ", rows, " rows of x");
    }
    require(bounds.back() == rows, "ends must not fall and end at the ", rows, " rows of x, got ",
            bounds.back());
  }
  int64_t count() const { return bounds.size() - 1; }
  int64_t first(int64_t g) const { return bounds[g]; }
  int64_t size(int64_t g) const { return bounds[g + 1] - bounds[g]; }
};

template <class T>
Matrix<T> rows_of(const Tensor& x, const Groups& groups, int64_t g) {
  return Matrix<T>::of(x).some_rows(groups.first(g), groups.size(g));
}

// Calls f(T, S): numbers of T, multiplied as S.
template <class F>
void with_types(const Tensor& x, F&& f) {
  dispatch(x, "x", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, double>)
      require(false, "x must be float32, bfloat16 or float16");
    else
      with_factor_type<T>([&]<class S>(std::type_identity<S>) {
        f(std::type_identity<T>{}, std::type_identity<S>{});
      });
  });
}

Tensor grouped_linear(const Tensor& x_in, const Tensor& weight_in, const Tensor& ends) {
  require(x_in.dim() == 2 && weight_in.dim() == 3 && x_in.size(1) == weight_in.size(2) &&
              ends.numel() == weight_in.size(0),
          "x must be (rows, in_features) and weight (groups, out_features, in_features)");
  require(weight_in.scalar_type() == x_in.scalar_type(), "weight must have the dtype of x");
  const Groups groups(ends, x_in.size(0));
  const Tensor x = with_a_unit_stride(x_in);
  const bool in_place = weight_in.stride(1) == 1 || weight_in.stride(2) == 1;
  const Tensor weight = in_place ? weight_in : torch::stable::contiguous(weight_in);
  const int64_t columns = weight.size(1);
  Tensor y = empty({x.size(0), columns}, x.scalar_type());
  if (y.numel() == 0) return y;
  with_types(x, [&]<class T, class S>(std::type_identity<T>, std::type_identity<S>) {
    if (x.size(1) == 0) std::fill_n(mutable_data<T>(y), y.numel(), T{});
    for (int64_t g = 0; g < groups.count(); ++g) {
      if (groups.size(g) == 0 || x.size(1) == 0) continue;
      const Matrix<T> of_group{data<T>(weight) + g * weight.stride(0), columns, weight.size(2),
                               weight.stride(1), weight.stride(2)};
      Product<T, S>(rows_of<T>(x, groups, g), of_group, nullptr,
                    mutable_data<T>(y) + groups.first(g) * columns)
          .run();
    }
  });
  return y;
}

// Of each group the sum of dy[i] times x[i] over its rows.
Tensor grouped_outer(const Tensor& dy_in, const Tensor& x_in, const Tensor& ends) {
  require(dy_in.dim() == 2 && x_in.dim() == 2 && dy_in.size(0) == x_in.size(0) &&
              dy_in.scalar_type() == x_in.scalar_type(),
          "grad_output and x must be matrices of as many rows and of one dtype");
  const Groups groups(ends, x_in.size(0));
  const Tensor dy = with_a_unit_stride(dy_in), x = with_a_unit_stride(x_in);
  const int64_t size = dy.size(1) * x.size(1);
  Tensor out = empty({groups.count(), dy.size(1), x.size(1)}, x.scalar_type());
  if (size == 0) return out;
  with_types(x, [&]<class T, class S>(std::type_identity<T>, std::type_identity<S>) {
    for (int64_t g = 0; g < groups.count(); ++g) {
      T* to = mutable_data<T>(out) + g * size;
      if (groups.size(g) == 0)
        std::fill_n(to, size, T{});
      else
        Product<T, S>(rows_of<T>(dy, groups, g).transposed(), rows_of<T>(x, groups, g).transposed(),
                      nullptr, to)
            .run();
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_outer", TORCH_BOX(&grouped_outer));
}

}  // namespace
}  // namespace aigc_fast

// y = x @ weight^T + bias where torch's own products are slow: float32 by a library that leaves
// AVX-512 unused, 16-bit numbers on processors without instructions for them, and bf16 where those
// instructions are of vectors, not of matrices.
#include "linear_product.h"

namespace aigc_fast {
namespace {

Tensor linear_product(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias_in) {
  require(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(1),
          "x must be (rows, in_features) and weight (out_features, in_features)");
  require(x_in.size(1) > 0, "x must have features");
  require(weight_in.scalar_type() == x_in.scalar_type(), "weight must have the dtype of x");
  const Tensor x = with_a_unit_stride(x_in), weight = with_a_unit_stride(weight_in);
  const int64_t columns = weight.size(0);
  Tensor y = empty({x.size(0), columns}, x.scalar_type());
  if (y.numel() == 0) return y;
  dispatch(x, "x", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, double>) {
      require(false, "x must be float32, bfloat16 or float16");
    } else {
      std::vector<float> bias;
      if (bias_in) {
        require(bias_in->dim() == 1 && bias_in->size(0) == columns &&
                    bias_in->scalar_type() == x.scalar_type(),
                "bias must have shape (out_features,) and the dtype of x");
        bias.resize(columns);
        convert(data<T>(as_contiguous(*bias_in)), columns, bias.data());
      }
      const float* start = bias_in ? bias.data() : nullptr;
      with_factor_type<T>([&]<class S>(std::type_identity<S>) {
        Product<T, S>(Matrix<T>::of(x), Matrix<T>::of(weight), start, mutable_data<T>(y)).run();
      });
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&linear_product));
}

}  // namespace
}  // namespace aigc_fast

// y = residual + gain * prelu(conv(x, weight) + bias): 3x3, a border of zeros, channels_last.
#include "conv3x3_rows.h"
#include "conv_products.h"
#include "memory_order.h"

namespace aigc_fast {
namespace {

template <class Products, class T>
void convolve(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
              const ConvWeight<T>& weight, const ConvFinish<T>& finish, const T* residual, T* y) {
  const Products products(weight, {s.in, s.out, 9});
  const int64_t rows = s.batch * s.height, depth = Products::depth(s.in);
  // A thread's first row costs three rows of input.
  const int64_t grain = std::max<int64_t>(4, (1 << 18) / (s.width * s.in * s.out * 9) + 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    ImageRows<typename Products::S, T> image(sources, s, depth, Products::pixels(s.width));
    [[maybe_unused]] const typename Products::Session session;
    for (int64_t r = begin; r < end; ++r) {
      const auto around = image.around(r / s.height, r % s.height);
      const typename Products::S* taps[9];
      for (int tap = 0; tap < 9; ++tap) taps[tap] = around[tap / 3] + tap % 3 * depth;
      const int64_t at = r * s.width * s.out;
      products.run(taps, depth, s.width, {y + at, s.out, {residual ? residual + at : nullptr}},
                   finish);
    }
  });
}

Tensor conv3x3(const std::vector<Tensor>& xs, const Tensor& weight_in, const MaybeTensor& bias,
               const MaybeTensor& slope, const MaybeTensor& residual_in, double gain) {
  const ScalarType dtype = weight_in.scalar_type();
  require(weight_in.dim() == 4 && weight_in.size(2) == 3 && weight_in.size(3) == 3,
          "weight must have shape (out, in, 3, 3)");
  require(!xs.empty(), "x must be at least one tensor");
  ConvShape s{};
  for (const Tensor& x : xs) {
    require(x.dim() == 4, "x must have 4 dimensions");
    require(x.scalar_type() == dtype, "x must have the dtype of weight");
    const ConvShape own{x.size(0), x.size(2), x.size(3), s.in + x.size(1), weight_in.size(0)};
    require(
        &x == &xs[0] || (own.batch == s.batch && own.height == s.height && own.width == s.width),
        "x must be tensors of one batch, height and width");
    s = own;
  }
  require(s.in == weight_in.size(1) && s.in > 0, "weight must have the channels of x, ", s.in);
  require(s.height > 0 && s.width > 0, "x must have height and width");
  for (const auto& p : {bias, slope, residual_in})
    require(!p || p->scalar_type() == dtype, "bias, slope and residual must have the dtype of x");

  Tensor y = empty_in_order({s.batch, s.out, s.height, s.width}, dtype, true);
  MaybeTensor residual;
  if (residual_in) {
    require(same_shape(*residual_in, y), "residual must have the shape of the result");
    residual = in_order_of(*residual_in, y);
  }
  if (y.numel() == 0) return y;
  const Tensor weight = as_contiguous(weight_in);
  dispatch(weight, "weight", [&]<class T>(T) {
    std::vector<ConvInput<T>> sources;
    for (const Tensor& x : xs)
      sources.push_back({data<T>(x), x.size(1), x.stride(0), x.size(1) == 1 ? 1 : x.stride(1),
                         x.stride(2), x.stride(3)});
    using A = Acc<T>;
    const std::vector<A> biases = padded_channels<T>(bias, "bias", s.out, 0);
    const std::vector<A> slopes = padded_channels<T>(slope, "slope", s.out, 1);
    with_products<T>(s.out, [&]<class Products>(std::type_identity<Products>) {
      convolve<Products, T>(sources, s, {data<T>(weight), s.in * 9, 9, 1},
                            {biases.data(), slopes.data(), A(gain), 1, s.out},
                            residual ? data<T>(*residual) : nullptr, mutable_data<T>(y));
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }

}  // namespace
}  // namespace aigc_fast

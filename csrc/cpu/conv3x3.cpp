// y = residual + gain * prelu(conv(x, weight) + bias): 3x3, a border of zeros, channels_last.
#include "conv3x3_rows.h"
#include "conv_products.h"
#include "conv_winograd.h"
#include "conv_winograd_weight.h"

namespace aigc_fast {
namespace {

template <class Products, class T>
void multiply(const std::vector<ConvInput<T>>& sources, const ConvShape& s,
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

// Fewer inputs are not worth the passes before and after, nor a tile of which half is unused.
// Against products of bf16, which are twice as many a cycle, it pays while there are few pixels:
// weights, which it packs in less time, take most of the time then.
template <class Products>
bool winograd_pays(const ConvShape& s) {
  if (!Products::kVectors || s.in < 16 || s.height < 2 || s.width < 2) return false;
  return sizeof(typename Products::S) > 2 || s.batch * s.height * s.width <= 256;
}

template <class T>
void convolve(const std::vector<Tensor>& xs, const ConvShape& s, const ConvWeight<T>& weight,
              const ConvFinish<T>& finish, const T* residual, T* y) {
  with_products<T>(s.out, [&]<class Products>(std::type_identity<Products>) {
    std::vector<ConvInput<T>> sources;
    if (winograd_pays<Products>(s)) {
      const std::vector<Tensor> inputs = all_channels_innermost<T>(xs);
      for (const Tensor& x : inputs) sources.push_back(input_of<T>(x));
      return Winograd<Conv3x3, T>(sources, s, weight, finish, residual, y).run();
    }
    for (const Tensor& x : xs) sources.push_back(input_of<T>(x));
    multiply<Products, T>(sources, s, weight, finish, residual, y);
  });
}

// The sizes, checked, of the convolution of xs by a weight of `in` inputs and `out` outputs.
ConvShape shape_of(const std::vector<Tensor>& xs, const Tensor& weight, int64_t in, int64_t out) {
  require(!xs.empty(), "x must be at least one tensor");
  ConvShape s{};
  for (const Tensor& x : xs) {
    require(x.dim() == 4, "x must have 4 dimensions");
    require(x.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
    const ConvShape own{x.size(0), x.size(2), x.size(3), s.in + x.size(1), out};
    require(
        &x == &xs[0] || (own.batch == s.batch && own.height == s.height && own.width == s.width),
        "x must be tensors of one batch, height and width");
    s = own;
  }
  require(s.in == in && in > 0, "weight must have the channels of x, ", s.in);
  require(s.height > 0 && s.width > 0, "x must have height and width");
  return s;
}

Tensor conv3x3(const std::vector<Tensor>& xs, const Tensor& weight_in, const MaybeTensor& bias,
               const MaybeTensor& slope, const MaybeTensor& residual_in, double gain) {
  const ScalarType dtype = weight_in.scalar_type();
  const Tensor weight = with_taps(weight_in, 3);
  const ConvShape s = shape_of(xs, weight, weight.size(1), weight.size(0));
  for (const auto& p : {bias, slope, residual_in})
    require(!p || p->scalar_type() == dtype, "bias, slope and residual must have the dtype of x");

  Tensor y = empty_in_order({s.batch, s.out, s.height, s.width}, dtype, true);
  MaybeTensor residual;
  if (residual_in) {
    require(same_shape(*residual_in, y), "residual must have the shape of the result");
    residual = in_order_of(*residual_in, y);
  }
  if (y.numel() == 0) return y;
  dispatch(weight, "weight", [&]<class T>(T) {
    using A = Acc<T>;
    const std::vector<A> biases = padded_channels<T>(bias, "bias", s.out, 0);
    const std::vector<A> slopes = padded_channels<T>(slope, "slope", s.out, 1);
    convolve<T>(xs, s, {data<T>(weight), weight.stride(0), weight.stride(1), weight.stride(3)},
                {biases.data(), slopes.data(), A(gain), 1, s.out},
                residual ? data<T>(*residual) : nullptr, mutable_data<T>(y));
  });
  return y;
}

// The gradient of the input: the convolution of that of the output by the weight turned around.
Tensor conv3x3_backward_input(const Tensor& grad, const Tensor& weight_in) {
  const Tensor weight = with_taps(weight_in, 3);
  const ConvShape s = shape_of({grad}, weight, weight.size(0), weight.size(1));
  Tensor y = empty_in_order({s.batch, s.out, s.height, s.width}, grad.scalar_type(), true);
  if (y.numel() == 0) return y;
  dispatch(weight, "weight", [&]<class T>(T) {
    using A = Acc<T>;
    const std::vector<A> biases = padded_channels<T>({}, "bias", s.out, 0);
    const std::vector<A> slopes = padded_channels<T>({}, "slope", s.out, 1);
    convolve<T>({grad}, s,
                {data<T>(weight) + 8 * weight.stride(3), weight.stride(1), weight.stride(0),
                 -weight.stride(3)},
                {biases.data(), slopes.data(), 1, 1, s.out}, nullptr, mutable_data<T>(y));
  });
  return y;
}

// The gradient of the weight, contiguous.
Tensor conv3x3_backward_weight(const Tensor& grad, const Tensor& x) {
  return winograd_weight<Conv3x3>(grad, x);
}

// A contiguous copy of a channels_last image, by blocks of registers: torch's copies 2 GB/s.
Tensor to_planes(const Tensor& x) {
  require(x.dim() == 4 && is_channels_last(x), "x must be channels_last");
  Tensor y = empty_contiguous_like(x);
  const int64_t channels = x.size(1), size = x.size(2) * x.size(3);
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  dispatch(x, "x", [&]<class T>(T) {
    in_parallel(x.size(0) * blocks, kBlock * channels, [&](int64_t i) {
      const int64_t n = i / blocks, at = i % blocks * kBlock;
      copy_transposed(data<T>(x) + (n * size + at) * channels, channels, channels,
                      std::min(kBlock, size - at), mutable_data<T>(y) + n * channels * size + at,
                      size);
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("to_planes", TORCH_BOX(&to_planes));
  m.impl("conv3x3_backward_input", TORCH_BOX(&conv3x3_backward_input));
  m.impl("conv3x3_backward_weight", TORCH_BOX(&conv3x3_backward_weight));
}

}  // namespace
}  // namespace aigc_fast

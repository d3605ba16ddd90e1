// The convolution of 4x4 weights with stride 2 and a border of one zero, by which GANs and
// autoencoders halve images; the transposed one, which doubles them; the gradients of both.
#include "conv_winograd.h"
#include "conv_winograd_weight.h"

namespace aigc_fast {
namespace {

// weight_in has its outputs in dimension `out_dim`, 0 or 1, and its inputs in the other.
template <class Kind>
Tensor convolve(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias,
                int64_t out_dim) {
  const Tensor weight = with_taps(weight_in, 4);
  require(x_in.dim() == 4, "x must have 4 dimensions");
  require(x_in.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
  require(x_in.size(1) == weight.size(1 - out_dim) && x_in.size(1) > 0,
          "weight must have the channels of x, ", x_in.size(1));
  require(!bias || bias->scalar_type() == x_in.scalar_type(), "bias must have the dtype of x");
  const ConvShape s{x_in.size(0), x_in.size(2), x_in.size(3), x_in.size(1), weight.size(out_dim)};
  Tensor y = empty_in_order({s.batch, s.out, Kind::length(s.height), Kind::length(s.width)},
                            x_in.scalar_type(), true);
  if (y.numel() == 0) return y;
  dispatch(x_in, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Tensor x = channels_innermost<T>(x_in);
    const std::vector<ConvInput<T>> sources{input_of<T>(x)};
    const std::vector<A> biases = padded_channels<T>(bias, "bias", s.out, 0);
    const std::vector<A> slopes = padded_channels<T>({}, "slope", s.out, 1);
    Winograd<Kind, T>(
        sources, s,
        {data<T>(weight), weight.stride(out_dim), weight.stride(1 - out_dim), weight.stride(3)},
        {biases.data(), slopes.data(), 1, 1, s.out}, nullptr, mutable_data<T>(y))
        .run();
  });
  return y;
}

Tensor conv4x4(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  require(x.dim() == 4 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0,
          "x must have an even height and width");
  return convolve<StridedConv4x4>(x, weight, bias, 0);
}

Tensor conv_transpose4x4(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  return convolve<TransposedConv4x4>(x, weight, bias, 1);
}

// Of conv4x4's weight: grad is that of its output. With x and grad exchanged, that of
// conv_transpose4x4's.
Tensor conv4x4_backward_weight(const Tensor& grad, const Tensor& x) {
  require(x.dim() == 4 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0,
          "x must have an even height and width");
  return winograd_weight<StridedConv4x4>(grad, x);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("conv4x4", TORCH_BOX(&conv4x4));
  m.impl("conv_transpose4x4", TORCH_BOX(&conv_transpose4x4));
  m.impl("conv4x4_backward_weight", TORCH_BOX(&conv4x4_backward_weight));
}

}  // namespace
}  // namespace aigc_fast

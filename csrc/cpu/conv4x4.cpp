// The convolution of 4x4 weights with stride 2 and a border of one zero, by which GANs and
// autoencoders halve images; the transposed one, which doubles them; the gradients of both.
#include "conv_winograd.h"
#include "conv_winograd_weight.h"

namespace aigc_fast {
namespace {

void check(const Tensor& x, const Tensor& weight, int64_t in) {
  require(x.dim() == 4, "x must have 4 dimensions");
  require(weight.dim() == 4 && weight.size(2) == 4 && weight.size(3) == 4,
          "weight must have a kernel of 4x4");
  require(x.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
  require(x.size(1) == in && in > 0, "weight must have the channels of x, ", x.size(1));
}

// weight_in has its outputs in dimension `out_dim`, 0 or 1, and its inputs in the other.
template <class Kind>
Tensor convolve(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias,
                int64_t out_dim) {
  check(x_in, weight_in, weight_in.size(1 - out_dim));
  require(!bias || bias->scalar_type() == x_in.scalar_type(), "bias must have the dtype of x");
  const Tensor weight = as_contiguous(weight_in);
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
    Winograd<Kind, T>(sources, s,
                      {data<T>(weight), weight.stride(out_dim), weight.stride(1 - out_dim), 1},
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
Tensor conv4x4_backward_weight(const Tensor& grad_in, const Tensor& x_in) {
  require(grad_in.dim() == 4 && x_in.dim() == 4, "grad and x must have 4 dimensions");
  require(grad_in.scalar_type() == x_in.scalar_type(), "grad must have the dtype of x");
  require(grad_in.size(0) == x_in.size(0) && 2 * grad_in.size(2) == x_in.size(2) &&
              2 * grad_in.size(3) == x_in.size(3),
          "grad must have the batch and half the height and width of x");
  const ConvShape s{x_in.size(0), x_in.size(2), x_in.size(3), x_in.size(1), grad_in.size(1)};
  Tensor weight = empty({s.out, s.in, 4, 4}, x_in.scalar_type());
  dispatch(x_in, "x", [&]<class T>(T) {
    if (x_in.numel() == 0 || weight.numel() == 0) {  // a sum of nothing
      std::memset(static_cast<void*>(mutable_data<T>(weight)), 0, weight.numel() * sizeof(T));
      return;
    }
    const Tensor x = channels_innermost<T>(x_in), grad = channels_innermost<T>(grad_in);
    WinogradWeight<StridedConv4x4, T>(input_of<T>(x), input_of<T>(grad), s)
        .run(mutable_data<T>(weight));
  });
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("conv4x4", TORCH_BOX(&conv4x4));
  m.impl("conv_transpose4x4", TORCH_BOX(&conv_transpose4x4));
  m.impl("conv4x4_backward_weight", TORCH_BOX(&conv4x4_backward_weight));
}

}  // namespace
}  // namespace aigc_fast

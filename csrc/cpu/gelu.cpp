// The tanh form of gelu, alone or in the place of its input, and its derivative: by the sigmoid of
// the gates, in a fourth (fp32) to a ninth (bf16) of the time that torch's tanh takes.
#include "tensor.h"
#include "two_vectors.h"

#include <aigc_fast/smooth_activation.h>

namespace aigc_fast {
namespace {

constexpr int64_t kPiece = 8192;  // elements per unit of work

void check(const Tensor& x) { require(x.is_contiguous(), "x must be contiguous"); }

// y[i] = f({inputs[0][i], ...}); y may be one of the inputs.
template <class T, int X, class F>
void map_all(std::array<const T*, X> inputs, T* y, int64_t count, F&& f) {
  in_parallel((count + kPiece - 1) / kPiece, kPiece, [&](int64_t u) {
    const int64_t begin = u * kPiece;
    std::array<const T*, X> from;
    for (int k = 0; k < X; ++k) from[k] = inputs[k] + begin;
    map_row<T, X, 0, Ties::away>(std::min(kPiece, count - begin), from, y + begin, f);
  });
}

void forward(const Tensor& x, Tensor& y) {
  dispatch(x, "x", [&]<class T>(T) {
    map_all<T, 1>({data<T>(x)}, mutable_data<T>(y), x.numel(),
                  [](const auto& v) { return smooth<Smooth::gelu_tanh, Acc<T>, T>(v[0]); });
  });
}

Tensor gelu_tanh(const Tensor& x) {
  check(x);
  Tensor y = empty_like_dense(x);
  forward(x, y);
  return y;
}

void gelu_tanh_(Tensor x) {
  check(x);
  forward(x, x);
}

Tensor gelu_tanh_backward(const Tensor& dy, const Tensor& x) {
  check(x);
  check_like(dy, x, "grad_output");
  const Tensor from = in_order_of(dy, x);
  Tensor dx = empty_like_dense(x);
  dispatch(x, "x", [&]<class T>(T) {
    map_all<T, 2>({data<T>(from), data<T>(x)}, mutable_data<T>(dx), x.numel(), [](const auto& v) {
      return v[0] * activate<Smooth::gelu_tanh, Acc<T>, T>(v[1]).slope;
    });
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("gelu_tanh", TORCH_BOX(&gelu_tanh));
  m.impl("gelu_tanh_", TORCH_BOX(&gelu_tanh_));
  m.impl("gelu_tanh_backward", TORCH_BOX(&gelu_tanh_backward));
}

}  // namespace
}  // namespace aigc_fast

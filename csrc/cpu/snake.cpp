// y = x + sin^2(alpha x) / (beta + eps) with alpha and beta per channel, its backward and double
// backward. The gradients of alpha and beta are summed in the pass that writes those of x.
#include "snake.h"

namespace aigc_fast {
namespace {

void check(const Tensor& x, const Tensor& alpha, const Tensor& beta) {
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  require(alpha.scalar_type() == x.scalar_type(), "alpha must have the dtype of x");
  require(beta.scalar_type() == x.scalar_type(), "beta must have the dtype of x");
}

void check_gradient(const Tensor& gradient, const Tensor& x) {
  require(same_shape(gradient, x), "gradients must have the shape of x");
  require(gradient.scalar_type() == x.scalar_type(), "gradients must have the dtype of x");
}

// [2][channels]: alpha and 1 / (beta + eps), with room for `more` values of each channel.
template <class A>
std::vector<A> values_of(const Channels& l, const Tensor& alpha, const std::vector<double>& inverse,
                         int more = 0) {
  std::vector<A> values((2 + more) * l.channels);
  channel_values<A>(alpha, l.channels, "alpha", A(0), values.data());
  std::copy(inverse.begin(), inverse.end(), values.begin() + l.channels);
  return values;
}

Tensor snake(const Tensor& x_in, const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  const Tensor x = as_dense(x_in);
  const Channels l = channels_of(x);
  Tensor y = empty_like_dense(x);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    std::vector<A> values = values_of<A>(l, alpha, inverse_of(beta, l.channels));
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    sum_then_write<A, 2>(
        l, values.data(), NoSums{}, [](int64_t, const double*) {},
        [=](int64_t i, auto lanes, const Vec<A>* v) __attribute__((always_inline)) {
          const Vec<A> at = load(in + i, lanes);
          store(out + i, at + sines<T, A>(v[0] * at).squared * v[1], lanes);
        });
  });
  return y;
}

// With b = 1 / (beta + eps):
//   dx = dy (1 + alpha b sin(2 alpha x)), dalpha = sum dy x b sin(2 alpha x),
//   dbeta = -sum dy b^2 sin^2(alpha x)
std::tuple<Tensor, Tensor, Tensor> snake_backward(const Tensor& dy_in, const Tensor& x_in,
                                                  const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  check_gradient(dy_in, x_in);
  const Tensor x = as_dense(x_in), dy = in_order_of(dy_in, x);
  const Channels l = channels_of(x);
  Tensor dx = empty_like_dense(x);
  const std::vector<double> inverse = inverse_of(beta, l.channels);
  std::vector<double> dalpha(l.channels), dbeta(l.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const std::vector<A> values = values_of<A>(l, alpha, inverse);
    const T *in = data<T>(x), *grad = data<T>(dy);
    T* out = mutable_data<T>(dx);
    sum_channels<A, 2>(l, values.data(),
                       sums<A, 2, 2>([=](int64_t i, auto lanes, const Vec<A>* v,
                                         Vec<A>* sums) __attribute__((always_inline)) {
                         const Vec<A> at = load(in + i, lanes), g = load(grad + i, lanes);
                         const Sines<A> s = sines<T, A>(v[0] * at);
                         store(out + i, g * (A(1) + v[0] * v[1] * s.sin_twice), lanes);
                         sums[0] += g * at * s.sin_twice;
                         sums[1] += g * s.squared;
                       }),
                       [&](int64_t c, const double* sums) {
                         dalpha[c] = sums[0] * inverse[c];
                         dbeta[c] = -sums[1] * inverse[c] * inverse[c];
                       });
  });
  return {dx, like_parameter(dalpha, alpha, x.scalar_type()),
          like_parameter(dbeta, beta, x.scalar_type())};
}

// The gradients of <gg, dx> + <gg_alpha, dalpha> + <gg_beta, dbeta> of dy, x, alpha and beta.
std::tuple<Tensor, Tensor, Tensor, Tensor> snake_double_backward(
    const Tensor& gg_in, const Tensor& gg_alpha, const Tensor& gg_beta, const Tensor& dy_in,
    const Tensor& x_in, const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  check_gradient(dy_in, x_in);
  check_gradient(gg_in, x_in);
  const Tensor x = as_dense(x_in), dy = in_order_of(dy_in, x), gg = in_order_of(gg_in, x);
  const Channels l = channels_of(x);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  std::vector<double> dalpha(l.channels), dbeta(l.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    std::vector<A> values = values_of<A>(l, alpha, inverse_of(beta, l.channels), 2);
    A *b = values.data() + l.channels, *of_alpha = b + l.channels, *of_beta = of_alpha + l.channels;
    channel_values<A>(gg_alpha, l.channels, "gg_alpha", A(0), of_alpha);
    channel_values<A>(gg_beta, l.channels, "gg_beta", A(0), of_beta);
    for (int64_t c = 0; c < l.channels; ++c) of_alpha[c] *= b[c], of_beta[c] *= b[c] * b[c];
    const T *in = data<T>(x), *grad = data<T>(dy), *second = data<T>(gg);
    T *out = mutable_data<T>(grad_dy), *out_x = mutable_data<T>(grad_x);
    sum_channels<A, 4>(
        l, values.data(),
        sums<A, 4, 2>([=](int64_t i, auto lanes, const Vec<A>* v,
                          Vec<A>* sums) __attribute__((always_inline)) {
          const Vec<A> at = load(in + i, lanes), g = load(grad + i, lanes);
          const Vec<A> w = load(second + i, lanes);
          const auto [alpha, b, p, q] = std::tuple(v[0], v[1], v[2], v[3]);
          const Sines<A> s = sines<T, A>(alpha * at);
          // d (x sin(2 alpha x)) / dx, and of sin(2 alpha x) in alpha
          const Vec<A> slope = s.sin_twice + A(2) * alpha * at * s.cos_twice;
          store(out + i,
                w * (A(1) + alpha * b * s.sin_twice) + p * at * s.sin_twice - q * s.squared, lanes);
          store(out_x + i,
                g * (A(2) * alpha * alpha * b * w * s.cos_twice + p * slope -
                     q * alpha * s.sin_twice),
                lanes);
          sums[0] += g * (w * b * slope + A(2) * p * at * at * s.cos_twice - q * at * s.sin_twice);
          sums[1] += g * b * (A(2) * q * s.squared - (w * alpha * b + p * at) * s.sin_twice);
        }),
        [&](int64_t c, const double* sums) { dalpha[c] = sums[0], dbeta[c] = sums[1]; });
  });
  return {grad_dy, grad_x, like_parameter(dalpha, alpha, x.scalar_type()),
          like_parameter(dbeta, beta, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("snake", TORCH_BOX(&snake));
  m.impl("snake_backward", TORCH_BOX(&snake_backward));
  m.impl("snake_double_backward", TORCH_BOX(&snake_double_backward));
}

}  // namespace
}  // namespace aigc_fast

// y = x + sin^2(alpha x) / (beta + eps) with alpha and beta per channel, its backward and double
// backward. The gradients of alpha and beta are summed in the pass that writes those of x: a norm
// of norm_tiles.h is a channel here.
#include "snake.h"
#include "map_tile.h"

namespace aigc_fast {
namespace {

void check(const Tensor& x, const Tensor& alpha, const Tensor& beta) {
  require(alpha.scalar_type() == x.scalar_type(), "alpha must have the dtype of x");
  require(beta.scalar_type() == x.scalar_type(), "beta must have the dtype of x");
}

// What every element needs of its channel; b = 1 / (beta + eps). Further values may follow.
enum ChannelValue { kAlpha, kB, kValues };

template <class A, int V>
Values<A, V> values_of(const Norms& channels, const Tensor& alpha,
                       const std::vector<double>& inverse) {
  Values<A, V> values(channels.total());
  channel_values<A>(alpha, channels.total(), "alpha", A(0), values.row(kAlpha));
  std::copy(inverse.begin(), inverse.end(), values.row(kB));
  return values;
}

Tensor snake(const Tensor& x_in, const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  const Tensor x = as_dense(x_in);
  const Norms channels = norms_of_channels(x);
  Tensor y = empty_like_dense(x);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const auto values = values_of<A, kValues>(channels, alpha, inverse_of(beta, channels.total()));
    const Places<T, 1, 1> places{{data<T>(x)}, {mutable_data<T>(y)}};
    const auto element = [](auto& x, auto& at, auto& y, Vec<A>*) __attribute__((always_inline)) {
      y[0] = x[0] + sines<A, A>(at[kAlpha] * x[0]).squared * at[kB];
    };
    for_all_tiles(channels, [&](const Tile& tile) { map_tile(tile, values, places, element); });
  });
  return y;
}

//   dx = dy (1 + alpha b sin(2 alpha x)), dalpha = sum dy x b sin(2 alpha x),
//   dbeta = -sum dy b^2 sin^2(alpha x)
std::tuple<Tensor, Tensor, Tensor> snake_backward(const Tensor& dy_in, const Tensor& x_in,
                                                  const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  check_like(dy_in, x_in, "grad_output");
  const Tensor x = as_dense(x_in), dy = in_order_of(dy_in, x);
  const Norms channels = norms_of_channels(x);
  Tensor dx = empty_like_dense(x);
  const std::vector<double> inverse = inverse_of(beta, channels.total());
  std::vector<double> dalpha(channels.total()), dbeta(channels.total());
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const auto values = values_of<A, kValues>(channels, alpha, inverse);
    const Places<T, 2, 1> places{{data<T>(x), data<T>(dy)}, {mutable_data<T>(dx)}};
    const auto element = [](auto& in, auto& at, auto& dx, Vec<A>* to)
                             __attribute__((always_inline)) {
                               const Vec<A> x = in[0], dy = in[1];
                               const Sines<A> s = sines<A, A>(at[kAlpha] * x);
                               dx[0] = dy * (A(1) + at[kAlpha] * at[kB] * s.sin_twice);
                               to[0] += dy * x * s.sin_twice;
                               to[1] += dy * s.squared;
                             };
    const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
      map_tile<2>(tile, values, places, sums, columns, element);
    };
    const auto finish = [&](int64_t c, const double* sums) {
      dalpha[c] = sums[0] * inverse[c];
      dbeta[c] = -sums[1] * inverse[c] * inverse[c];
    };
    sum_then_write(channels, 2, sum, for_norms<2>(finish));
  });
  return {dx, like_parameter(dalpha, alpha, x.scalar_type()),
          like_parameter(dbeta, beta, x.scalar_type())};
}

// The gradients of <gg, dx> + <gg_alpha, dalpha> + <gg_beta, dbeta> of dy, x, alpha and beta.
std::tuple<Tensor, Tensor, Tensor, Tensor> snake_double_backward(
    const Tensor& gg_in, const Tensor& gg_alpha, const Tensor& gg_beta, const Tensor& dy_in,
    const Tensor& x_in, const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  check_like(dy_in, x_in, "grad_output");
  check_like(gg_in, x_in, "grad_grad");
  const Tensor x = as_dense(x_in), dy = in_order_of(dy_in, x), gg = in_order_of(gg_in, x);
  const Norms channels = norms_of_channels(x);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  const std::vector<double> inverse = inverse_of(beta, channels.total());
  std::vector<double> dalpha(channels.total()), dbeta(channels.total());
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    enum { kOfAlpha = kValues, kOfBeta, kAll };
    auto values = values_of<A, kAll>(channels, alpha, inverse);
    A *of_alpha = values.row(kOfAlpha), *of_beta = values.row(kOfBeta);
    channel_values<A>(gg_alpha, channels.total(), "gg_alpha", A(0), of_alpha);
    channel_values<A>(gg_beta, channels.total(), "gg_beta", A(0), of_beta);
    for (int64_t c = 0; c < channels.total(); ++c) {
      of_alpha[c] *= A(inverse[c]);
      of_beta[c] *= A(inverse[c]) * A(inverse[c]);
    }
    const Places<T, 3, 2> places{{data<T>(x), data<T>(dy), data<T>(gg)},
                                 {mutable_data<T>(grad_dy), mutable_data<T>(grad_x)}};
    const auto element = [](auto& in, auto& at, auto& out,
                            Vec<A>* to) __attribute__((always_inline)) {
      const Vec<A> x = in[0], dy = in[1], gg = in[2];
      const Vec<A> alpha = at[kAlpha], b = at[kB], p = at[kOfAlpha], q = at[kOfBeta];
      const Sines<A> s = sines<A, A>(alpha * x);
      // d (x sin(2 alpha x)) / dx, and of sin(2 alpha x) in alpha
      const Vec<A> slope = s.sin_twice + A(2) * alpha * x * s.cos_twice;
      out[0] = gg * (A(1) + alpha * b * s.sin_twice) + p * x * s.sin_twice - q * s.squared;
      out[1] =
          dy * (A(2) * alpha * alpha * b * gg * s.cos_twice + p * slope - q * alpha * s.sin_twice);
      to[0] += dy * (gg * b * slope + A(2) * p * x * x * s.cos_twice - q * x * s.sin_twice);
      to[1] += dy * b * (A(2) * q * s.squared - (gg * alpha * b + p * x) * s.sin_twice);
    };
    const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
      map_tile<2>(tile, values, places, sums, columns, element);
    };
    const auto finish = [&](int64_t c, const double* sums) {
      dalpha[c] = sums[0], dbeta[c] = sums[1];
    };
    sum_then_write(channels, 2, sum, for_norms<2>(finish));
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

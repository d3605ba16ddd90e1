// y = x + sin^2(alpha x) / (beta + eps) with alpha and beta per channel, its backward and double
// backward. The gradients of alpha and beta are summed in the pass that writes those of x: a norm
// of norm_tiles.h is a channel here.
#include "snake.h"
#include "norm_tiles.h"

namespace aigc_fast {
namespace {

void check(const Tensor& x, const Tensor& alpha, const Tensor& beta) {
  require(alpha.scalar_type() == x.scalar_type(), "alpha must have the dtype of x");
  require(beta.scalar_type() == x.scalar_type(), "beta must have the dtype of x");
}

void check_gradient(const Tensor& gradient, const Tensor& x) {
  require(same_shape(gradient, x), "gradients must have the shape of x");
  require(gradient.scalar_type() == x.scalar_type(), "gradients must have the dtype of x");
}

// What every element needs of its channel; b = 1 / (beta + eps). Further values may follow.
enum Value { kAlpha, kB, kValues };

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
  with_arithmetic(x, [&]<class A>(A) {
    const auto values = values_of<A, kValues>(channels, alpha, inverse_of(beta, channels.total()));
    const Stream<A> in = stream_of<A>(x), out = stream_of<A>(y);
    for_all_tiles<A>(channels, [&](const Tile& tile) {
      Buffer<A> at;
      in.load(tile, at);
      for_tile<A>(tile, values, [&](int64_t i, const Vec<A>* v) __attribute__((always_inline)) {
        const Vec<A> x = load(at.at + i);
        store(at.at + i, x + sines<A, A>(v[kAlpha] * x).squared * v[kB]);
      });
      out.store(tile, at);
    });
  });
  return y;
}

//   dx = dy (1 + alpha b sin(2 alpha x)), dalpha = sum dy x b sin(2 alpha x),
//   dbeta = -sum dy b^2 sin^2(alpha x)
std::tuple<Tensor, Tensor, Tensor> snake_backward(const Tensor& dy_in, const Tensor& x_in,
                                                  const Tensor& alpha, const Tensor& beta) {
  check(x_in, alpha, beta);
  check_gradient(dy_in, x_in);
  const Tensor x = as_dense(x_in), dy = in_order_of(dy_in, x);
  const Norms channels = norms_of_channels(x);
  Tensor dx = empty_like_dense(x);
  const std::vector<double> inverse = inverse_of(beta, channels.total());
  std::vector<double> dalpha(channels.total()), dbeta(channels.total());
  with_arithmetic(x, [&]<class A>(A) {
    const auto values = values_of<A, kValues>(channels, alpha, inverse);
    const Stream<A> in = stream_of<A>(x), grad = stream_of<A>(dy), out = stream_of<A>(dx);
    const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
      Buffer<A> at, g;
      in.load(tile, at);
      grad.load(tile, g);
      add_tile<A, 2>(tile, values, sums, columns,
                     [&](int64_t i, const Vec<A>* v, Vec<A>* to) __attribute__((always_inline)) {
                       const Vec<A> x = load(at.at + i), dy = load(g.at + i);
                       const Sines<A> s = sines<A, A>(v[kAlpha] * x);
                       store(g.at + i, dy * (A(1) + v[kAlpha] * v[kB] * s.sin_twice));
                       to[0] += dy * x * s.sin_twice;
                       to[1] += dy * s.squared;
                     });
      out.store(tile, g);
    };
    const auto finish = [&](int64_t c, const double* sums) {
      dalpha[c] = sums[0] * inverse[c];
      dbeta[c] = -sums[1] * inverse[c] * inverse[c];
    };
    sum_norms<A, 2>(channels, sum, finish);
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
  const Norms channels = norms_of_channels(x);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  const std::vector<double> inverse = inverse_of(beta, channels.total());
  std::vector<double> dalpha(channels.total()), dbeta(channels.total());
  with_arithmetic(x, [&]<class A>(A) {
    enum { kOfAlpha = kValues, kOfBeta, kAll };
    auto values = values_of<A, kAll>(channels, alpha, inverse);
    A *of_alpha = values.row(kOfAlpha), *of_beta = values.row(kOfBeta);
    channel_values<A>(gg_alpha, channels.total(), "gg_alpha", A(0), of_alpha);
    channel_values<A>(gg_beta, channels.total(), "gg_beta", A(0), of_beta);
    for (int64_t c = 0; c < channels.total(); ++c) {
      of_alpha[c] *= A(inverse[c]);
      of_beta[c] *= A(inverse[c]) * A(inverse[c]);
    }
    const Stream<A> in = stream_of<A>(x), grad = stream_of<A>(dy), second = stream_of<A>(gg);
    const Stream<A> out_dy = stream_of<A>(grad_dy), out_x = stream_of<A>(grad_x);
    const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
      Buffer<A> at, g, w;
      in.load(tile, at);
      grad.load(tile, g);
      second.load(tile, w);
      add_tile<A, 2>(
          tile, values, sums, columns,
          [&](int64_t i, const Vec<A>* v, Vec<A>* to) __attribute__((always_inline)) {
            const Vec<A> x = load(at.at + i), dy = load(g.at + i), gg = load(w.at + i);
            const auto [alpha, b, p, q] = std::tuple(v[kAlpha], v[kB], v[kOfAlpha], v[kOfBeta]);
            const Sines<A> s = sines<A, A>(alpha * x);
            // d (x sin(2 alpha x)) / dx, and of sin(2 alpha x) in alpha
            const Vec<A> slope = s.sin_twice + A(2) * alpha * x * s.cos_twice;
            store(w.at + i,
                  gg * (A(1) + alpha * b * s.sin_twice) + p * x * s.sin_twice - q * s.squared);
            store(g.at + i, dy * (A(2) * alpha * alpha * b * gg * s.cos_twice + p * slope -
                                  q * alpha * s.sin_twice));
            to[0] += dy * (gg * b * slope + A(2) * p * x * x * s.cos_twice - q * x * s.sin_twice);
            to[1] += dy * b * (A(2) * q * s.squared - (gg * alpha * b + p * x) * s.sin_twice);
          });
      out_dy.store(tile, w);
      out_x.store(tile, g);
    };
    sum_norms<A, 2>(channels, sum, [&](int64_t c, const double* sums) {
      dalpha[c] = sums[0], dbeta[c] = sums[1];
    });
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

// noisy = alpha * sample + sigma * noise; velocity = alpha_rate * sample + sigma_rate * noise.
#include "per_sample.h"

namespace aigc_fast {
namespace {

// The first result and, if has_velocity, the second. No noise stands for zeros, no rates for
// (-sigma, alpha).
template <bool has_velocity>
std::pair<Tensor, Tensor> mix(const Tensor& sample_in, const MaybeTensor& noise_in,
                              const Tensor& alpha_in, const Tensor& sigma_in,
                              const MaybeTensor& alpha_rate_in = {},
                              const MaybeTensor& sigma_rate_in = {}) {
  const int64_t batch = sample_in.dim() ? sample_in.size(0) : -1;
  require(batch >= 0, "sample must have a batch dimension");
  const bool rated = alpha_rate_in.has_value();
  require(rated == sigma_rate_in.has_value(), "rates must be two tensors");
  const auto check_scale = [&](const Tensor& c) {
    require(c.dim() == 1 && c.size(0) == batch, "alpha, sigma and rates must have shape (", batch,
            ",)");
  };
  check_scale(alpha_in), check_scale(sigma_in);
  if (rated) check_scale(*alpha_rate_in), check_scale(*sigma_rate_in);
  if (noise_in) check_like(*noise_in, sample_in, "noise", "sample");
  SampleRows rows(sample_in, true);
  Tensor noisy = rows.order(), velocity = has_velocity ? rows.like() : noisy;
  const Tensor sample = rows.arrange(sample_in);
  const Tensor noise = noise_in ? rows.arrange(*noise_in) : sample;
  const Scalars alpha(alpha_in, "alpha"), sigma(sigma_in, "sigma");
  const Scalars alpha_rate = rated ? Scalars(*alpha_rate_in, "rates") : sigma;
  const Scalars sigma_rate = rated ? Scalars(*sigma_rate_in, "rates") : alpha;
  const double sign = rated ? 1 : -1;
  dispatch(sample, "sample", [&]<class T>(T) {
    using A = Acc<T>;
    const auto x = rows.read<T>(sample), n = rows.read<T>(noise);
    const auto y = rows.write<T>(noisy), v = rows.write<T>(velocity);
    auto run = [&]<bool has_noise>() {
      rows.for_pieces([=, &alpha, &sigma, &alpha_rate, &sigma_rate](int64_t row, int64_t begin,
                                                                    int64_t length) {
        const A a = A(alpha[row]), s = A(sigma[row]);
        const A da = A(sign * alpha_rate[row]), ds = A(sigma_rate[row]);
        const T *xs = x.at + row * x.stride + begin, *ns = n.at + row * n.stride + begin;
        T *ys = y.at + row * y.stride + begin, *vs = v.at + row * v.stride + begin;
        for_vectors<A>(length, [&](int64_t i, auto lanes) {
          const Vec<A> from = load(xs + i, lanes);
          const Vec<A> z = has_noise ? load(ns + i, lanes) : Vec<A>{};
          store(ys + i, has_noise ? from * a + z * s : from * a, lanes);
          if constexpr (has_velocity)
            store(vs + i, has_noise ? from * da + z * ds : from * da, lanes);
        });
      });
    };
    noise_in ? run.template operator()<true>() : run.template operator()<false>();
  });
  return {rows.finish(noisy), has_velocity ? rows.finish(velocity) : noisy};
}

Tensor add_noise(const Tensor& sample, const Tensor& noise, const Tensor& alpha,
                 const Tensor& sigma) {
  return mix<false>(sample, noise, alpha, sigma).first;
}

std::tuple<Tensor, Tensor> add_noise_velocity(const Tensor& sample, const MaybeTensor& noise,
                                              const Tensor& alpha, const Tensor& sigma,
                                              const MaybeTensor& alpha_rate,
                                              const MaybeTensor& sigma_rate) {
  return mix<true>(sample, noise, alpha, sigma, alpha_rate, sigma_rate);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_velocity", TORCH_BOX(&add_noise_velocity));
}

}  // namespace
}  // namespace aigc_fast

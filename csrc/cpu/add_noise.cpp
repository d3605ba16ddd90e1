// noisy = alpha * sample + sigma * noise; velocity = alpha_rate * sample + sigma_rate * noise.
#include "per_sample.h"

namespace aigc_fast {
namespace {

// No noise stands for zeros, no rates for (-sigma, alpha).
std::vector<Tensor> add_noise(const Tensor& sample_in, const std::optional<Tensor>& noise_in,
                              const Tensor& alpha_in, const Tensor& sigma_in, bool return_velocity,
                              const std::optional<Tensor>& alpha_rate_in,
                              const std::optional<Tensor>& sigma_rate_in) {
  const int64_t batch = sample_in.dim() ? sample_in.size(0) : -1;
  require(batch >= 0, "sample must have a batch dimension");
  const bool rated = alpha_rate_in.has_value();
  require(rated == sigma_rate_in.has_value(), "rates must be two tensors");
  const Tensor &first_rate = rated ? *alpha_rate_in : sigma_in,
               &second_rate = rated ? *sigma_rate_in : alpha_in;
  for (const Tensor* c : {&alpha_in, &sigma_in, &first_rate, &second_rate})
    require(c->dim() == 1 && c->size(0) == batch, "alpha, sigma and rates must have shape (", batch,
            ",)");
  if (noise_in)
    require(same_shape(*noise_in, sample_in) && noise_in->scalar_type() == sample_in.scalar_type(),
            "noise must have the shape and dtype of sample");
  SampleRows rows(sample_in, true);
  Tensor noisy = rows.order(), velocity = return_velocity ? rows.like() : noisy;
  const Tensor sample = rows.arrange(sample_in);
  const Tensor noise = noise_in ? rows.arrange(*noise_in) : sample;
  const Scalars alpha(alpha_in, "alpha"), sigma(sigma_in, "sigma");
  const Scalars alpha_rate(first_rate, "rates"), sigma_rate(second_rate, "rates");
  const double sign = rated ? 1 : -1;
  dispatch(sample, "sample", [&]<class T>(T) {
    using A = Acc<T>;
    const auto x = rows.read<T>(sample), n = rows.read<T>(noise);
    const auto y = rows.write<T>(noisy), v = rows.write<T>(velocity);
    auto run = [&]<bool has_noise, bool has_velocity>() {
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
    if (noise_in)
      return_velocity ? run.template operator()<true, true>()
                      : run.template operator()<true, false>();
    else
      return_velocity ? run.template operator()<false, true>()
                      : run.template operator()<false, false>();
  });
  if (return_velocity) return {rows.finish(noisy), rows.finish(velocity)};
  return {rows.finish(noisy)};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("add_noise", TORCH_BOX(&add_noise)); }

}  // namespace
}  // namespace aigc_fast

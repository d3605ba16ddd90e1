// noisy = alpha * sample + sigma * noise; velocity = alpha * noise - sigma * sample.
#include "per_sample.h"

namespace aigc_fast {
namespace {

// No noise stands for zeros: with -sigma the operator is then its own adjoint.
std::vector<Tensor> add_noise(const Tensor& sample_in, const std::optional<Tensor>& noise_in,
                              const Tensor& alpha_in, const Tensor& sigma_in,
                              bool return_velocity) {
  const int64_t batch = sample_in.dim() ? sample_in.size(0) : -1;
  require(batch >= 0, "sample must have a batch dimension");
  for (const Tensor* c : {&alpha_in, &sigma_in})
    require(c->dim() == 1 && c->size(0) == batch, "alpha and sigma must have shape (", batch, ",)");
  if (noise_in)
    require(same_shape(*noise_in, sample_in) && noise_in->scalar_type() == sample_in.scalar_type(),
            "noise must have the shape and dtype of sample");
  SampleRows rows(sample_in, true);
  Tensor noisy = rows.order(), velocity = return_velocity ? rows.like() : noisy;
  const Tensor sample = rows.arrange(sample_in);
  const Tensor noise = noise_in ? rows.arrange(*noise_in) : sample;
  const Scalars alpha(alpha_in, "alpha"), sigma(sigma_in, "sigma");
  dispatch(sample, "sample", [&]<class T>(T) {
    using A = Acc<T>;
    const auto x = rows.read<T>(sample), n = rows.read<T>(noise);
    const auto y = rows.write<T>(noisy), v = rows.write<T>(velocity);
    auto run = [&]<bool has_noise, bool has_velocity>() {
      rows.for_pieces([=, &alpha, &sigma](int64_t row, int64_t begin, int64_t length) {
        const A a = A(alpha[row]), s = A(sigma[row]);
        const T *xs = x.at + row * x.stride + begin, *ns = n.at + row * n.stride + begin;
        T *ys = y.at + row * y.stride + begin, *vs = v.at + row * v.stride + begin;
        for_vectors<A>(length, [&](int64_t i, auto lanes) {
          const Vec<A> from = load(xs + i, lanes);
          const Vec<A> z = has_noise ? load(ns + i, lanes) : Vec<A>{};
          store(ys + i, has_noise ? from * a + z * s : from * a, lanes);
          if constexpr (has_velocity)
            store(vs + i, has_noise ? z * a - from * s : from * -s, lanes);
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

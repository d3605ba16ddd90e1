// The derivative of a denoising step, all that scheduler_step.cpp writes.
#include "scheduler_step.h"

namespace aigc_fast {
namespace {

// Gradients of sample, model_output, uncond_output (if given), noise (if has_noise), history.
std::vector<Tensor> scheduler_step_backward(const Tensor& grad_in, const MaybeTensor& grad_x0_in,
                                            const MaybeTensor& grad_second_in,
                                            const Tensor& sample_in, const Tensor& output_in,
                                            const Tensor& coefficients,
                                            const MaybeTensor& uncond_in, double scale,
                                            bool has_noise, int64_t num_history) {
  const SchedulerCall call(sample_in, output_in, coefficients, uncond_in, scale, 0, num_history);
  call.check(grad_in, "grad_output");
  if (grad_x0_in) call.check(*grad_x0_in, "grad_output");
  if (grad_second_in) call.check(*grad_second_in, "grad_output");
  SampleRows rows(sample_in, call.per_sample);
  const Tensor sample = rows.arrange(sample_in), output = rows.arrange(output_in);
  const Tensor uncond = uncond_in ? rows.arrange(*uncond_in) : output;
  const Tensor grad = rows.arrange(grad_in);
  const Tensor grad_x0 = grad_x0_in ? rows.arrange(*grad_x0_in) : grad;
  const Tensor grad_second = grad_second_in ? rows.arrange(*grad_second_in) : grad;
  const int first = uncond_in ? 3 : 2, extras = has_noise + num_history;
  std::vector<Tensor> grads{rows.order()};
  while (static_cast<int>(grads.size()) < first + extras) grads.push_back(rows.like());
  dispatch(sample, "sample", [&]<class T>(T) {
    using A = Acc<T>;
    const auto x = rows.read<T>(sample), c = rows.read<T>(output), u = rows.read<T>(uncond);
    const auto table = call.table<A>(num_history, has_noise);
    const auto g = rows.read<T>(grad), g_x0 = rows.read<T>(grad_x0);
    const auto g_second = rows.read<T>(grad_second);
    RowPointer<T> out[3 + kMaxExtras];
    for (size_t i = 0; i < grads.size(); ++i) out[i] = rows.write<T>(grads[i]);
    rows.for_pieces([&](int64_t row, int64_t begin, int64_t length) {
      const StepRow<A> k = table[call.per_sample ? row : 0];
      const A s = A(scale);
      const bool guided = uncond_in.has_value(), has_x0 = grad_x0_in.has_value();
      const bool has_second = grad_second_in.has_value();
      const auto from = [=](auto p) { return p.at + row * p.stride + begin; };
      const T *xs = from(x), *cs = from(c), *us = from(u), *gs = from(g), *hs = from(g_x0);
      const T* ws = from(g_second);
      T* to[3 + kMaxExtras] = {};
      for (int i = 0; i < first + extras; ++i) to[i] = from(out[i]);
      for_vectors<A>(length, [=](int64_t i, auto lanes) {
        const Vec<A> xi = load(xs + i, lanes), gi = load(gs + i, lanes);
        Vec<A> m = load(cs + i, lanes);
        if (guided) m = guide<A>(m, load(us + i, lanes), s);
        const Vec<A> wi = has_second ? load(ws + i, lanes) : Vec<A>{};
        const auto both = [&](A prev, A second) {
          return has_second ? gi * prev + wi * second : gi * prev;
        };
        Vec<A> t = both(k.prev.x0, k.second.x0);
        if (has_x0) t += load(hs + i, lanes);
        t = abs<A>(xi * k.x0_sample + m * k.x0_output) <= k.clip ? t : Vec<A>{};
        const Vec<A> dm = t * k.x0_output + both(k.prev.output, k.second.output);
        store(to[0] + i, t * k.x0_sample + both(k.prev.sample, k.second.sample), lanes);
        store(to[1] + i, guided ? dm * s : dm, lanes);
        if (guided) store(to[2] + i, dm * (A(1) - s), lanes);
        for (int e = 0; e < extras; ++e)
          store(to[first + e] + i, both(k.prev.extra[e], k.second.extra[e]), lanes);
      });
    });
  });
  for (Tensor& t : grads) t = rows.finish(t);
  return grads;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("scheduler_step_backward", TORCH_BOX(&scheduler_step_backward));
}

}  // namespace
}  // namespace aigc_fast

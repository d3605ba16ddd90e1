// One denoising step: x0 = clamp(A * sample + B * m, -r, r);
// prev = P * x0 + Q * sample + R * m + N * noise + sum_k H_k * history_k; maybe a second such
// combination of the same tensors.
// m is the model's output, or of two outputs uncond + scale * (cond - uncond) times a factor.
#include "scheduler_step.h"

#include "two_vectors.h"

namespace aigc_fast {
namespace {

// Count, mean and sum of squared deviations, joined as Chan et al. (1979) do.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(const Moments& o) {
    const double total = count + o.count, delta = o.mean - mean;
    squares += o.squares + delta * delta * count * o.count / total;
    mean += delta * o.count / total;
    count = total;
  }
};

// value(i, lanes) for i < length; the data is in the L1 cache when it is read again.
template <class A, class F>
Moments moments(int64_t length, F value) {
  Vec<A> sum = {}, squares = {};
  for_vectors<A>(length, [&](int64_t i, auto lanes) { sum += value(i, lanes); });
  const A mean = sum_lanes<A>(sum) / A(length);
  for_vectors<A>(length, [&](int64_t i, auto lanes) {
    Vec<A> d = value(i, lanes) - mean;
    for (int l = lanes; l < kLanes<A>; ++l) d[l] = 0;
    squares += d * d;
  });
  return {double(length), mean, sum_lanes<A>(squares)};
}

// For each sample rescale * std(cond) / std(guided) + 1 - rescale.
template <class T>
std::vector<Acc<T>> rescale_factors(SampleRows& rows, RowPointer<const T> cond,
                                    RowPointer<const T> uncond, double scale, double rescale) {
  using A = Acc<T>;
  const int64_t pieces = (rows.inner + SampleRows::kPiece - 1) / SampleRows::kPiece;
  std::vector<std::pair<Moments, Moments>> partial(rows.rows * pieces);
  rows.for_pieces([&](int64_t row, int64_t begin, int64_t length) {
    const T* c = cond.at + row * cond.stride + begin;
    const T* u = uncond.at + row * uncond.stride + begin;
    partial[row * pieces + begin / SampleRows::kPiece] = {
        moments<A>(length, [=](int64_t i, auto lanes) { return load(c + i, lanes); }),
        moments<A>(length, [=](int64_t i, auto lanes) {
          return guide<A>(load(c + i, lanes), load(u + i, lanes), A(scale));
        })};
  });
  std::vector<A> factors(rows.rows);
  for (int64_t row = 0; row < rows.rows; ++row) {
    std::pair<Moments, Moments> all;
    for (int64_t p = 0; p < pieces; ++p) {
      all.first.add(partial[row * pieces + p].first);
      all.second.add(partial[row * pieces + p].second);
    }
    factors[row] = A(rescale * std::sqrt(all.first.squares / all.second.squares) + 1 - rescale);
  }
  return factors;
}

// prev, x0 if it is asked for, and the second result if the row has one.
struct StepResults {
  Tensor prev;
  MaybeTensor x0, second;
};

StepResults run_step(const Tensor& sample_in, const Tensor& output_in, const Tensor& coefficients,
                     std::vector<Tensor> history, const MaybeTensor& noise,
                     const MaybeTensor& uncond_in, double scale, double rescale, bool return_x0) {
  const int64_t num_history = history.size();
  const SchedulerCall call(sample_in, output_in, coefficients, uncond_in, scale, rescale,
                           num_history);
  if (noise) {
    call.check(*noise, "noise");
    history.insert(history.begin(), *noise);
  }
  SampleRows rows(sample_in, call.per_sample || rescale != 0);
  const Tensor sample = rows.arrange(sample_in), output = rows.arrange(output_in);
  const Tensor uncond = uncond_in ? rows.arrange(*uncond_in) : output;
  for (Tensor& h : history) {
    call.check(h, "history");
    h = rows.arrange(h);
  }
  const int extras = history.size();
  Tensor prev = rows.order(), x0 = return_x0 ? rows.like() : prev;
  Tensor second = call.has_second ? rows.like() : prev;
  dispatch(sample, "sample", [&]<class T>(T) {
    using A = Acc<T>;
    const auto x = rows.read<T>(sample), c = rows.read<T>(output), u = rows.read<T>(uncond);
    const auto out = rows.write<T>(prev), out_x0 = rows.write<T>(x0);
    const auto out_second = rows.write<T>(second);
    RowPointer<const T> extra[kMaxExtras];
    for (int e = 0; e < extras; ++e) extra[e] = rows.read<T>(history[e]);
    std::vector<A> factors;
    if (rescale != 0) factors = rescale_factors<T>(rows, c, u, scale, rescale);
    const auto table = call.table<A>(num_history, noise.has_value());
    // Without history, noise and further results the loop has no branch.
    const bool is_plain = !extras && !return_x0 && !call.has_second;
    auto run = [&]<bool guided, bool plain>() {
      rows.for_pieces([&](int64_t row, int64_t begin, int64_t length) {
        const StepRow<A> k = table[call.per_sample ? row : 0];
        const int count = plain ? 0 : extras;
        const A s = A(scale), factor = factors.empty() ? A(1) : factors[row];
        const auto from = [=](auto p) { return p.at + row * p.stride + begin; };
        const T *xs = from(x), *cs = from(c), *us = from(u), *es[kMaxExtras] = {};
        for (int e = 0; e < count; ++e) es[e] = from(extra[e]);
        T *ys = from(out), *zs = !plain && return_x0 ? from(out_x0) : nullptr;
        T* ss = !plain && call.has_second ? from(out_second) : nullptr;
        map_at<T, 3>(length, {ys, zs, ss}, [=](auto at) {
          const Vec<A> xi = at(xs);
          Vec<A> m = at(cs);
          if constexpr (guided) m = guide<A>(m, at(us), s) * factor;
          const Vec<A> zi = clamp_to<A>(xi * k.x0_sample + m * k.x0_output, k.clip);
          Vec<A> y = zi * k.prev.x0 + xi * k.prev.sample + m * k.prev.output;
          Vec<A> w = {};
          if (ss) w = zi * k.second.x0 + xi * k.second.sample + m * k.second.output;
          for (int e = 0; e < count; ++e) {
            const Vec<A> h = at(es[e]);
            y += h * k.prev.extra[e];
            if (ss) w += h * k.second.extra[e];
          }
          return Vectors<A, 3>{y, zi, w};
        });
      });
    };
    if (uncond_in)
      run.template operator()<true, false>();
    else if (is_plain)
      run.template operator()<false, true>();
    else
      run.template operator()<false, false>();
  });
  StepResults results{rows.finish(prev), {}, {}};
  if (return_x0) results.x0 = rows.finish(x0);
  if (call.has_second) results.second = rows.finish(second);
  return results;
}

std::vector<Tensor> scheduler_step_full(const Tensor& sample, const Tensor& output,
                                        const Tensor& coefficients, std::vector<Tensor> history,
                                        const MaybeTensor& noise, const MaybeTensor& uncond,
                                        double scale, double rescale, bool return_x0) {
  StepResults all = run_step(sample, output, coefficients, std::move(history), noise, uncond, scale,
                             rescale, return_x0);
  std::vector<Tensor> results{all.prev};
  for (MaybeTensor* more : {&all.x0, &all.second})
    if (*more) results.push_back(**more);
  return results;
}

Tensor scheduler_step(const Tensor& sample, const Tensor& output, const Tensor& coefficients,
                      const MaybeTensor& noise) {
  const auto results = run_step(sample, output, coefficients, {}, noise, {}, 1, 0, false);
  require(!results.second, "coefficients must be a row of one result");
  return results.prev;
}

std::tuple<Tensor, Tensor> scheduler_step_both(const Tensor& sample, const Tensor& output,
                                               const Tensor& coefficients,
                                               std::vector<Tensor> history,
                                               const MaybeTensor& noise) {
  const auto results =
      run_step(sample, output, coefficients, std::move(history), noise, {}, 1, 0, true);
  require(!results.second, "coefficients must be a row of one result");
  return {results.prev, *results.x0};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("scheduler_step", TORCH_BOX(&scheduler_step));
  m.impl("scheduler_step_both", TORCH_BOX(&scheduler_step_both));
  m.impl("scheduler_step_full", TORCH_BOX(&scheduler_step_full));
}

}  // namespace
}  // namespace aigc_fast

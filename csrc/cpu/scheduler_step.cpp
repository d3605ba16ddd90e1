// One denoising step: x0 = clamp(A * sample + B * m, -r, r);
// prev = P * x0 + Q * sample + R * m + N * noise + sum_k H_k * history_k; maybe a second such
// combination of the same tensors; and the backward.
// m is the model's output, or of two outputs uncond + scale * (cond - uncond) times a factor.
#include "clamp.h"
#include "per_sample.h"
#include "two_vectors.h"

namespace aigc_fast {
namespace {

constexpr int kMaxHistory = 5, kMaxExtras = 1 + kMaxHistory;  // noise and history

// The factors of x0, the sample, m, the noise (if there is noise) and the history.
template <class A>
struct Combination {
  A x0 = 0, sample = 0, output = 0, extra[kMaxExtras] = {};

  template <class F>
  void read(F at, int64_t begin, int64_t end, bool has_noise) {
    x0 = at(begin), sample = at(begin + 1), output = at(begin + 2);
    for (int64_t i = begin + (has_noise ? 3 : 4), e = 0; i < end; ++i) extra[e++] = at(i);
  }
};

// A row (A, B, r, P, Q, R, N, H_1, ..., H_k) of the coefficients, and (P, Q, R, N, H_1, ..., H_k)
// of the second result.
template <class A>
struct Row {
  A x0_sample, x0_output, clip;
  Combination<A> prev, second;

  Row(const Scalars& table, int64_t columns, int64_t num_history, int64_t row, bool has_noise) {
    // NaN without payload, of which store_two might make a number.
    const auto at = [&](int64_t i) {
      const A a = A(table[row * columns + i]);
      return std::isnan(a) ? std::numeric_limits<A>::quiet_NaN() : a;
    };
    x0_sample = at(0), x0_output = at(1), clip = at(2);
    const int64_t end = 7 + num_history;
    prev.read(at, 3, end, has_noise);
    if (columns > end) second.read(at, end, columns, has_noise);
  }
};

struct Call {
  const Tensor &sample, &output, &coefficients;
  const MaybeTensor& uncond;
  double scale;
  bool per_sample, has_second;
  int64_t columns;

  Call(const Tensor& sample, const Tensor& output, const Tensor& coefficients,
       const MaybeTensor& uncond, double scale, double rescale, int64_t num_history)
      : sample(sample), output(output), coefficients(coefficients), uncond(uncond), scale(scale) {
    check(output, "model_output");
    if (uncond) check(*uncond, "uncond_output");
    require(uncond || (scale == 1 && rescale == 0), "uncond_output must be given for guidance");
    const int64_t dim = coefficients.dim();
    require(num_history >= 0 && num_history <= kMaxHistory, "history must hold at most 5 tensors");
    require(dim == 1 || (dim == 2 && sample.dim() && coefficients.size(0) == sample.size(0)),
            "coefficients must be one row or one row for each sample");
    columns = coefficients.size(dim - 1);
    has_second = columns == 11 + 2 * num_history;
    require(has_second || columns == 7 + num_history,
            "coefficients must have 7 + len(history) columns, or 11 + 2 * len(history)");
    require(coefficients.scalar_type() == ScalarType::Float ||
                coefficients.scalar_type() == ScalarType::Double,
            "coefficients must be float32 or float64");
    require(rescale == 0 || sample.dim() > 1, "sample must have more than a batch dimension");
    per_sample = dim == 2;
  }
  // The rows of coefficients: one, or one for each sample.
  template <class A>
  std::vector<Row<A>> table(int64_t num_history, bool has_noise) const {
    const Scalars numbers(coefficients, "coefficients");
    std::vector<Row<A>> rows;
    for (int64_t i = 0; i < (per_sample ? coefficients.size(0) : 1); ++i)
      rows.emplace_back(numbers, columns, num_history, i, has_noise);
    return rows;
  }
  void check(const Tensor& x, const char* name) const { check_like(x, sample, name, "sample"); }
};

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

template <class A>
AIGC_INLINE Vec<A> guide(Vec<A> cond, Vec<A> uncond, A scale) {
  return uncond + (cond - uncond) * scale;
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

// [prev], then x0 if asked for, then the second result if the row has one
std::vector<Tensor> scheduler_step_full(const Tensor& sample_in, const Tensor& output_in,
                                        const Tensor& coefficients, std::vector<Tensor> history,
                                        const MaybeTensor& noise, const MaybeTensor& uncond_in,
                                        double scale, double rescale, bool return_x0) {
  const int64_t num_history = history.size();
  const Call call(sample_in, output_in, coefficients, uncond_in, scale, rescale, num_history);
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
        const Row<A> k = table[call.per_sample ? row : 0];
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
  std::vector<Tensor> results{rows.finish(prev)};
  if (return_x0) results.push_back(rows.finish(x0));
  if (call.has_second) results.push_back(rows.finish(second));
  return results;
}

Tensor scheduler_step(const Tensor& sample, const Tensor& output, const Tensor& coefficients,
                      const MaybeTensor& noise) {
  auto results = scheduler_step_full(sample, output, coefficients, {}, noise, {}, 1, 0, false);
  require(results.size() == 1, "coefficients must be a row of one result");
  return results[0];
}

// Gradients of sample, model_output, uncond_output (if given), noise (if has_noise), history.
std::vector<Tensor> scheduler_step_backward(const Tensor& grad_in, const MaybeTensor& grad_x0_in,
                                            const MaybeTensor& grad_second_in,
                                            const Tensor& sample_in, const Tensor& output_in,
                                            const Tensor& coefficients,
                                            const MaybeTensor& uncond_in, double scale,
                                            bool has_noise, int64_t num_history) {
  const Call call(sample_in, output_in, coefficients, uncond_in, scale, 0, num_history);
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
      const Row<A> k = table[call.per_sample ? row : 0];
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
  m.impl("scheduler_step", TORCH_BOX(&scheduler_step));
  m.impl("scheduler_step_full", TORCH_BOX(&scheduler_step_full));
  m.impl("scheduler_step_backward", TORCH_BOX(&scheduler_step_backward));
}

}  // namespace
}  // namespace aigc_fast

// The two terms of a VAE's bound: a draw of a diagonal Gaussian with its divergence from the
// standard normal, and the likelihood of the data; and their gradients.
#include "enum_dispatch.h"
#include "per_sample.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Bounds of the log-variance, as in aigc_fast/ops/elbo.py.
constexpr double kLowest = -30, kHighest = 20;

// The gradient that comes back to the sum of each sample.
Scalars upstream_of(const Tensor& grad, const char* name, const Tensor& batch) {
  require(grad.dim() == 1 && grad.size(0) == batch.size(0), name, " must have shape (",
          batch.size(0), ",)");
  return Scalars(grad, name);
}

// e^x - 1 and e^x - 1 - x, for e = e^x; near zero, where these cancel, by a polynomial.
template <class A>
AIGC_INLINE Vec<A> less_one(Vec<A> x, Vec<A> e) {
  if constexpr (std::is_same_v<A, double>)
    return expm1<A>(x);
  else
    return abs<A>(x) < 0.34f ? exp_tail(x) + x : e - 1.0f;
}
template <class A>
AIGC_INLINE Vec<A> less_line(Vec<A> x, Vec<A> e) {
  if constexpr (std::is_same_v<A, double>)
    return expm1<A>(x) - x;
  else
    return abs<A>(x) < 0.34f ? exp_tail(x) : e - 1.0f - x;
}
template <class A>
AIGC_INLINE Vec<A> clamped(Vec<A> log_variance) {
  return max<A>(min<A>(log_variance, broadcast(A(kHighest))), broadcast(A(kLowest)));
}

// The first or the second half of the channels.
Tensor half(const Tensor& parameters, int which) {
  require(parameters.dim() >= 2 && parameters.size(1) % 2 == 0,
          "parameters must have shape (batch, 2 * channels, ...)");
  Tensor whole = parameters;
  const int64_t channels = parameters.size(1) / 2;
  return torch::stable::narrow(whole, 1, which * channels, channels);
}

// What a call computes from, its rows in one memory order.
struct Gaussian {
  SampleRows rows;
  Tensor mean, log_variance;
  MaybeTensor noise;

  Gaussian(const Tensor& parameters, const MaybeTensor& noise_in)
      : rows(half(parameters, 0), true),
        mean(rows.arrange(half(parameters, 0))),
        log_variance(rows.arrange(half(parameters, 1))) {
    if (!noise_in) return;
    require(same_shape(*noise_in, mean) && noise_in->scalar_type() == mean.scalar_type(),
            "noise must have the shape of the mean and the dtype of parameters");
    noise = rows.arrange(*noise_in);
  }
};

std::tuple<Tensor, Tensor> sample_gaussian(const Tensor& parameters, const MaybeTensor& noise) {
  Gaussian g(parameters, noise);
  SampleSums sums(g.rows);
  Tensor out = g.rows.order();
  dispatch(parameters, "parameters", [&]<class T>(T) {
    using A = Acc<T>;
    const auto mean = g.rows.read<T>(g.mean), log_variance = g.rows.read<T>(g.log_variance);
    const auto noise = g.noise ? g.rows.read<T>(*g.noise) : mean;
    const auto sample = g.rows.write<T>(out);
    const bool noisy = g.noise.has_value();
    g.rows.for_pieces([=, &sums](int64_t row, int64_t begin, int64_t length) {
      const T *ms = mean.row(row) + begin, *vs = log_variance.row(row) + begin;
      const T* ns = noise.row(row) + begin;
      T* ys = sample.row(row) + begin;
      const auto [sum] = sums_over<A, 1>(length, [&](int64_t i, auto lanes, Vec<A>* total) {
        const Vec<A> m = load(ms + i, lanes), x = clamped<A>(load(vs + i, lanes));
        const Vec<A> variance = exp<A>(x);
        total[0] += only<A>(m * m + less_line<A>(x, variance), lanes);
        store(ys + i, noisy ? m + sqrt<A>(variance) * load(ns + i, lanes) : m, lanes);
      });
      sums.set(row, begin, sum);
    });
  });
  return {g.rows.finish(out), sums.of_each(parameters, 0.5)};
}

// (gradient of parameters, gradient of noise or empty)
std::tuple<Tensor, Tensor> sample_gaussian_backward(const MaybeTensor& grad_sample,
                                                    const MaybeTensor& grad_kl,
                                                    const Tensor& parameters,
                                                    const MaybeTensor& noise_in, bool of_noise) {
  Gaussian g(parameters, noise_in);
  SampleRows& rows = g.rows;
  require(!of_noise || (grad_sample && noise_in),
          "of_noise must be False without grad_sample and noise");
  Tensor grad = g.mean;  // read only where there is one
  if (grad_sample) {
    check_like(*grad_sample, g.mean, "grad_sample", "the sample");
    grad = rows.arrange(*grad_sample);
  }
  std::optional<Scalars> kl_scale;
  if (grad_kl) kl_scale = upstream_of(*grad_kl, "grad_kl", parameters);
  Tensor out =
      is_dense(parameters) ? empty_like_dense(parameters) : torch::stable::empty_like(parameters);
  Tensor halves[2] = {half(out, 0), half(out, 1)};
  const bool direct = rows.fits(halves[0]);
  Tensor to_mean = direct ? halves[0] : rows.like(), to_log = direct ? halves[1] : rows.like();
  Tensor to_noise = of_noise ? rows.order() : empty({0}, parameters.scalar_type());
  dispatch(parameters, "parameters", [&]<class T>(T) {
    using A = Acc<T>;
    const auto mean = rows.read<T>(g.mean), log_variance = rows.read<T>(g.log_variance);
    const auto noise = g.noise ? rows.read<T>(*g.noise) : mean, upstream = rows.read<T>(grad);
    const auto mean_grad = rows.write<T>(to_mean), log_grad = rows.write<T>(to_log);
    const auto noise_grad = of_noise ? rows.write<T>(to_noise) : mean_grad;
    const bool of_sample = grad_sample.has_value(), noisy = of_sample && g.noise.has_value();
    rows.for_pieces([=, &kl_scale](int64_t row, int64_t begin, int64_t length) {
      const T *ms = mean.row(row) + begin, *vs = log_variance.row(row) + begin;
      const T *ns = noise.row(row) + begin, *gs = upstream.row(row) + begin;
      T *to_m = mean_grad.row(row) + begin, *to_v = log_grad.row(row) + begin;
      T* to_n = noise_grad.row(row) + begin;
      const bool of_kl = kl_scale.has_value();
      const A scale = of_kl ? A((*kl_scale)[row]) : A(0);
      // The branches are the same in all of a piece: to have each call compiled for itself would
      // be 16 times the code.
      for_vectors<A>(length, [&](int64_t i, auto lanes) {
        const Vec<A> raw = load(vs + i, lanes), x = clamped<A>(raw), variance = exp<A>(x);
        Vec<A> m = {}, v = {};
        if (of_kl) {
          m = load(ms + i, lanes) * scale;
          v = less_one<A>(x, variance) * (scale * A(0.5));
        }
        if (of_sample) {
          const Vec<A> up = load(gs + i, lanes), deviation = sqrt<A>(variance);
          m += up;
          if (noisy) v += up * deviation * load(ns + i, lanes) * A(0.5);
          if (of_noise) store(to_n + i, up * deviation, lanes);
        }
        store(to_m + i, m, lanes);
        store(to_v + i, (raw >= A(kLowest)) & (raw <= A(kHighest)) ? v : Vec<A>{}, lanes);
      });
    });
  });
  if (!direct) torch::stable::copy_(halves[0], to_mean), torch::stable::copy_(halves[1], to_log);
  return {out, of_noise ? rows.finish(to_noise) : to_noise};
}

// The numbers are part of the operator's schema: aigc_fast/ops/elbo.py holds the same list.
enum class Likelihood : int64_t { bernoulli, gaussian, laplace };
constexpr int64_t kNumLikelihoods = 3;

template <Likelihood kind, class A>
AIGC_INLINE Vec<A> value(Vec<A> x, Vec<A> t) {
  if constexpr (kind == Likelihood::gaussian) return (x - t) * (x - t) * A(0.5);
  if constexpr (kind == Likelihood::laplace) return abs<A>(x - t);
  // softplus(x) - t x, where a large x meets t = 1 without cancelling
  return x * ((x > 0 ? broadcast(A(1)) : Vec<A>{}) - t) + log1p_unit<A>(exp<A>(minus_abs<A>(x)));
}
template <Likelihood kind, class A>
AIGC_INLINE Vec<A> slope(Vec<A> x, Vec<A> t) {
  if constexpr (kind == Likelihood::bernoulli) return sigmoid<A>(x) - t;
  const Vec<A> difference = x - t, one = broadcast(A(1)), zero = {};
  if constexpr (kind == Likelihood::gaussian) return difference;
  return (difference > 0 ? one : zero) - (difference < 0 ? one : zero);
}

// Output and target of one call, whatever is made of them.
class Pairs {
 public:
  Pairs(const Tensor& output, const Tensor& target, int64_t kind)
      : rows(output, true), output_(rows.arrange(output)), target_(target), kind_(kind) {
    require(kind >= 0 && kind < kNumLikelihoods, "kind must be in [0, ", kNumLikelihoods, ")");
    require(output.dim() > 0, "output must have a batch dimension");
    require(same_shape(target, output), "target must have the shape of output");
    target_ = rows.arrange(target);
  }

  // f(kind, T{}, row, begin, length, x, t) for pieces of samples, in parallel: T is the type of
  // the output; x(i, lanes) and t(i, lanes) are what stands at begin + i.
  template <class F>
  void for_pieces(F&& f) {
    with_types([&]<class T, class S>(T, S) {
      const auto output = rows.read<T>(output_);
      const auto target = rows.read<S>(target_);
      const auto run = [&](auto kind) {
        rows.for_pieces([=, &f](int64_t row, int64_t begin, int64_t length) {
          const T* xs = output.row(row) + begin;
          const S* ts = target.row(row) + begin;
          f(
              kind, T{}, row, begin, length, [=](int64_t i, auto n) { return load(xs + i, n); },
              [=](int64_t i, auto n) { return load(ts + i, n); });
        });
      };
      with_enum<Likelihood, kNumLikelihoods>(kind_, "kind", run);
    });
  }

  SampleRows rows;

 private:
  // f(T{}, S{}) with the types of output and target.
  template <class F>
  void with_types(F&& f) {
    dispatch(output_, "output", [&]<class T>(T) {
      if (target_.scalar_type() == output_.scalar_type()) return f(T{}, T{});
      if constexpr (sizeof(T) == 2)
        if (target_.scalar_type() == ScalarType::Float) return f(T{}, float{});
      require(false, "target must have the dtype of output or float32");
    });
  }

  Tensor output_, target_;
  int64_t kind_;
};

Tensor reconstruction_loss(const Tensor& output, const Tensor& target, int64_t kind) {
  Pairs pairs(output, target, kind);
  SampleSums sums(pairs.rows);
  pairs.for_pieces([&]<Likelihood p, class T>(std::integral_constant<Likelihood, p>, T, int64_t row,
                                              int64_t begin, int64_t length, auto x, auto t) {
    using A = Acc<T>;
    const auto [sum] = sums_over<A, 1>(length, [&](int64_t i, auto lanes, Vec<A>* total) {
      total[0] += only<A>(value<p, A>(x(i, lanes), t(i, lanes)), lanes);
    });
    sums.set(row, begin, sum);
  });
  return sums.of_each(output, 1);
}

Tensor reconstruction_loss_backward(const Tensor& grad, const Tensor& output, const Tensor& target,
                                    int64_t kind) {
  Pairs pairs(output, target, kind);
  const Scalars scales = upstream_of(grad, "grad_output", output);
  Tensor out = pairs.rows.order();
  pairs.for_pieces([&]<Likelihood p, class T>(std::integral_constant<Likelihood, p>, T, int64_t row,
                                              int64_t begin, int64_t length, auto x, auto t) {
    using A = Acc<T>;
    T* to = mutable_data<T>(out) + row * pairs.rows.inner + begin;
    const A scale = A(scales[row]);
    for_vectors<A>(length, [&](int64_t i, auto lanes) {
      store(to + i, slope<p, A>(x(i, lanes), t(i, lanes)) * scale, lanes);
    });
  });
  return pairs.rows.finish(out);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("sample_gaussian", TORCH_BOX(&sample_gaussian));
  m.impl("sample_gaussian_backward", TORCH_BOX(&sample_gaussian_backward));
  m.impl("reconstruction_loss", TORCH_BOX(&reconstruction_loss));
  m.impl("reconstruction_loss_backward", TORCH_BOX(&reconstruction_loss_backward));
}

}  // namespace
}  // namespace aigc_fast

// y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) per channel, its backward and its
// double backward: sums over each channel, a few numbers made of them, and one pass to write.
#include "act_dispatch.h"
#include "channels.h"

namespace aigc_fast {
namespace {

using Optional = std::optional<Tensor>;

// What every element needs of its channel. Further values of a pass follow.
enum Value { kMean, kRstd, kWeight, kBias, kValues };

template <class A>
std::vector<A> parameters(const Channels& l, int values, const Optional& mean, const Optional& var,
                          const Optional& weight, const Optional& bias, double eps) {
  std::vector<A> v(values * l.channels);
  channel_values<A>(mean, l.channels, "running_mean", 0, v.data() + kMean * l.channels);
  A* rstd = v.data() + kRstd * l.channels;
  channel_values<A>(var, l.channels, "running_var", 1, rstd);
  for (int64_t c = 0; c < l.channels; ++c) rstd[c] = static_cast<A>(1 / std::sqrt(rstd[c] + eps));
  channel_values<A>(weight, l.channels, "weight", 1, v.data() + kWeight * l.channels);
  channel_values<A>(bias, l.channels, "bias", 0, v.data() + kBias * l.channels);
  return v;
}

constexpr ScalarType sums_type(ScalarType x) {
  return x == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// (y, mean, var); the statistics are empty where they were given.
std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x_in, const Optional& running_mean,
                                                  const Optional& running_var,
                                                  const Optional& weight, const Optional& bias,
                                                  bool training, double eps, int64_t act,
                                                  double gain, double alpha) {
  const Tensor x = as_dense(x_in);
  const Channels l = channels_of(x);
  require(training || (running_mean && running_var), "running_mean and running_var must be given");
  require(!training || l.channels == 0 || l.count() > 1, "x must have 2 values a channel");
  for (const Optional* running : {&running_mean, &running_var})
    require(!*running || ((*running)->dim() == 1 && (*running)->size(0) == l.channels),
            "running_mean and running_var must have shape (", l.channels, ",)");
  const ScalarType wide = sums_type(x.scalar_type());
  Tensor y = empty_like_dense(x);
  Tensor mean = empty({training ? l.channels : 0}, wide);
  Tensor var = empty({training ? l.channels : 0}, wide);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    std::vector<A> values = parameters<A>(l, kValues, training ? Optional{} : running_mean,
                                          training ? Optional{} : running_var, weight, bias, eps);
    A* v = values.data();
    A *mean_out = mutable_data<A>(mean), *var_out = mutable_data<A>(var);
    const auto finish = [=](int64_t c, const double* statistics) {
      mean_out[c] = v[kMean * l.channels + c] = static_cast<A>(statistics[0]);
      var_out[c] = static_cast<A>(statistics[1]);
      v[kRstd * l.channels + c] = static_cast<A>(1 / std::sqrt(statistics[1] + eps));
    };
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    const A slope_alpha = static_cast<A>(alpha), factor = static_cast<A>(gain);
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) {
      const auto write = [=](int64_t i, auto lanes, const Vec<A>* at)
                             __attribute__((always_inline)) {
                               const Vec<A> normed = (load(in + i, lanes) - at[kMean]) * at[kRstd];
                               const Vec<A> z = normed * at[kWeight] + at[kBias];
                               store(out + i, activate<a, A>(z, slope_alpha) * factor, lanes);
                             };
      if (training) {
        sum_then_write<A, kValues>(l, v, Statistics<T>{in}, finish, write);
      } else {
        sum_then_write<A, kValues>(l, v, NoSums{}, [](int64_t, const double*) {}, write);
      }
    });
  });
  return {y, mean, var};
}

// With n the normalised x, z = n weight + bias, g = dy act'(z) gain:
//   dbias = sum g, dweight = sum g n, dx = weight rstd (g - (dbias + n dweight) / count)
// where the last terms are those of the statistics, which in evaluation do not depend on x.
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(const Tensor& dy_in, const Tensor& x_in,
                                                           const Tensor& mean, const Tensor& var,
                                                           const Optional& weight,
                                                           const Optional& bias, bool training,
                                                           double eps, int64_t act, double gain,
                                                           double alpha) {
  const Tensor x = as_dense(x_in);
  const Channels l = channels_of(x);
  require(same_shape(dy_in, x), "grad_output must have the shape of x");
  require(dy_in.scalar_type() == x.scalar_type(), "grad_output must have the dtype of x");
  const Tensor dy = in_order_of(dy_in, x);
  Tensor dx = empty_like_dense(x);
  std::vector<double> dweight(l.channels), dbias(l.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    enum { kG = kValues, kConstant, kNormed, kAll };
    std::vector<A> values = parameters<A>(l, kAll, mean, var, weight, bias, eps);
    A* v = values.data();
    const double share = training && l.size ? 1.0 / static_cast<double>(l.count()) : 0.0;
    const auto finish = [&, v](int64_t c, const double* sums) {
      const auto value = [&](int k) -> A& { return v[k * l.channels + c]; };
      dbias[c] = sums[0];
      dweight[c] = sums[1] * value(kRstd);
      const double scale = double(value(kWeight)) * value(kRstd);
      value(kG) = static_cast<A>(scale);
      value(kConstant) = static_cast<A>(-scale * share * sums[0]);
      value(kNormed) = static_cast<A>(-scale * share * dweight[c]);
    };
    const T *grad = data<T>(dy), *in = data<T>(x);
    T* out = mutable_data<T>(dx);
    const A slope_alpha = static_cast<A>(alpha), factor = static_cast<A>(gain);
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) {
      struct Element {
        Vec<A> centred, normed, g;
      };
      const auto element = [=](int64_t i, auto lanes,
                               const Vec<A>* at) __attribute__((always_inline)) {
        const Vec<A> centred = load(in + i, lanes) - at[kMean], normed = centred * at[kRstd];
        const Vec<A> z = normed * at[kWeight] + at[kBias];
        return Element{centred, normed,
                       load(grad + i, lanes) * (slope<a, A>(z, slope_alpha) * factor)};
      };
      const auto add = [=](int64_t i, auto lanes, const Vec<A>* at, Vec<A>* sums)
                           __attribute__((always_inline)) {
                             const Element e = element(i, lanes, at);
                             sums[0] += e.g;
                             sums[1] += e.g * e.centred;
                           };
      const auto write = [=](int64_t i, auto lanes,
                             const Vec<A>* at) __attribute__((always_inline)) {
        const Element e = element(i, lanes, at);
        store(out + i, e.g * at[kG] + e.normed * at[kNormed] + at[kConstant], lanes);
      };
      sum_then_write<A, kAll>(l, v, sums<A, kAll, 2>(add), finish, write);
    });
  });
  return {dx, like_parameter(dweight, weight, x.scalar_type()),
          like_parameter(dbias, bias, x.scalar_type())};
}

// The gradient of <gg, dx> + <gg_weight, dweight> + <gg_bias, dbias>. With the names above,
//   u = d/dg    = scale gg + u0 + u1 n       h = d/dz = u dy act''(z) gain
//   d/dn        = v0 gg + u1 g + weight h    scale = weight rstd
// grad_dy = u act'(z) gain, and grad_x takes d/dn through the norm. Ten sums over the channel, five
// where act'' = 0, decide u0, u1, v0 and what the norm adds.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_double_backward(
    const Tensor& gg_in, const Optional& gg_weight, const Optional& gg_bias, const Tensor& dy_in,
    const Tensor& x_in, const Tensor& mean, const Tensor& var, const Optional& weight,
    const Optional& bias, bool training, double eps, int64_t act, double gain, double alpha) {
  const Tensor x = as_dense(x_in);
  const Channels l = channels_of(x);
  for (const Tensor* grad : {&gg_in, &dy_in}) {
    require(same_shape(*grad, x), "gradients must have the shape of x");
    require(grad->scalar_type() == x.scalar_type(), "gradients must have the dtype of x");
  }
  const Tensor gg = in_order_of(gg_in, x), dy = in_order_of(dy_in, x);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  std::vector<double> grad_weight(l.channels), grad_bias(l.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    enum { kScale = kValues, kU0, kU1, kV0, kX0, kX1, kAll };
    std::vector<A> values = parameters<A>(l, kAll, mean, var, weight, bias, eps);
    A* v = values.data();
    std::vector<A> to_dweight(l.channels), to_dbias(l.channels);
    channel_values<A>(gg_weight, l.channels, "grad_grad_weight", 0, to_dweight.data());
    channel_values<A>(gg_bias, l.channels, "grad_grad_bias", 0, to_dbias.data());
    for (int64_t c = 0; c < l.channels; ++c)
      v[kScale * l.channels + c] = v[kWeight * l.channels + c] * v[kRstd * l.channels + c];
    const double share = training && l.size ? 1.0 / static_cast<double>(l.count()) : 0.0;
    const T *outer = data<T>(gg), *grad = data<T>(dy), *in = data<T>(x);
    T *out_dy = mutable_data<T>(grad_dy), *out_x = mutable_data<T>(grad_x);
    const A slope_alpha = static_cast<A>(alpha), factor = static_cast<A>(gain);
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) {
      constexpr bool curved = a > Act::lrelu;
      enum { kG, kGn, kGG, kGGn, kGGg, kK, kKn, kKnn, kKgg, kKggn, kEvery };
      constexpr int kSums = curved ? kEvery : kK;
      struct Element {
        Vec<A> normed, gg, s, g, k;
      };
      const auto element = [=](int64_t i, auto lanes,
                               const Vec<A>* at) __attribute__((always_inline)) {
        const Vec<A> normed = (load(in + i, lanes) - at[kMean]) * at[kRstd];
        const Vec<A> z = normed * at[kWeight] + at[kBias], dy = load(grad + i, lanes);
        const Vec<A> s = slope<a, A>(z, slope_alpha) * factor;
        return Element{normed, load(outer + i, lanes), s, dy * s,
                       dy * (curvature<a, A>(z, slope_alpha) * factor)};
      };
      const auto add = [=](int64_t i, auto lanes, const Vec<A>* at, Vec<A>* sums)
                           __attribute__((always_inline)) {
                             const Element e = element(i, lanes, at);
                             sums[kG] += e.g;
                             sums[kGn] += e.g * e.normed;
                             sums[kGG] += e.gg;
                             sums[kGGn] += e.gg * e.normed;
                             sums[kGGg] += e.gg * e.g;
                             if constexpr (curved) {
                               const Vec<A> kn = e.k * e.normed;
                               sums[kK] += e.k;
                               sums[kKn] += kn;
                               sums[kKnn] += kn * e.normed;
                               sums[kKgg] += e.k * e.gg;
                               sums[kKggn] += kn * e.gg;
                             }
                           };
      const auto finish = [&, v](int64_t c, const double* s) {
        const auto value = [&](int k) -> A& { return v[k * l.channels + c]; };
        const double w = value(kWeight), rstd = value(kRstd), scale = w * rstd;
        const double u0 = to_dbias[c] - scale * share * s[kGG];
        const double u1 = to_dweight[c] - scale * share * s[kGGn];
        const double v0 = -scale * share * s[kGn];
        const double to_scale = s[kGGg] - share * (s[kGG] * s[kG] + s[kGGn] * s[kGn]);
        double h = 0, hn = 0;  // sums of h and of h n
        if constexpr (curved) {
          h = scale * s[kKgg] + u0 * s[kK] + u1 * s[kKn];
          hn = scale * s[kKggn] + u0 * s[kKn] + u1 * s[kKnn];
        }
        const double to_n = v0 * s[kGG] + u1 * s[kG] + w * h;
        const double to_nn = v0 * s[kGGn] + u1 * s[kGn] + w * hn;
        value(kU0) = static_cast<A>(u0);
        value(kU1) = static_cast<A>(u1);
        value(kV0) = static_cast<A>(v0);
        value(kX0) = static_cast<A>(-rstd * share * to_n);
        value(kX1) = static_cast<A>(-rstd * share * (to_nn + scale * to_scale));
        grad_weight[c] = rstd * to_scale + hn;
        grad_bias[c] = h;
      };
      const auto write = [=](int64_t i, auto lanes,
                             const Vec<A>* at) __attribute__((always_inline)) {
        const Element e = element(i, lanes, at);
        const Vec<A> u = at[kScale] * e.gg + at[kU0] + at[kU1] * e.normed;
        store(out_dy + i, u * e.s, lanes);
        Vec<A> to_n = at[kV0] * e.gg + at[kU1] * e.g;
        if constexpr (curved) to_n += at[kWeight] * (u * e.k);
        store(out_x + i, at[kRstd] * to_n + at[kX0] + at[kX1] * e.normed, lanes);
      };
      sum_then_write<A, kAll>(l, v, sums<A, kAll, kSums>(add), finish, write);
    });
  });
  return {grad_dy, grad_x, like_parameter(grad_weight, weight, x.scalar_type()),
          like_parameter(grad_bias, bias, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
  m.impl("batch_norm_act_double_backward", TORCH_BOX(&batch_norm_act_double_backward));
}

}  // namespace
}  // namespace aigc_fast

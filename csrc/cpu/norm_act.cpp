// y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) for every norm of x, its backward
// and its double backward: sums over each norm, a few numbers made of them, and one pass to write.
//
// Differences are taken before products, as in g - mean(g): where they cancel, what is left is as
// exact as the terms, and not as the terms times the scale.
#include "act_dispatch.h"
#include "channels.h"
#include "norm_tiles.h"

namespace aigc_fast {
namespace {

using Optional = std::optional<Tensor>;

// The numbers are part of the schema: whose mean and variance.
enum Statistics : int64_t { kGiven, kOfBatch, kOfSample, kOfPixel };

Tensor in_layout(const Tensor& x, int64_t statistics) {
  require(statistics >= kGiven && statistics <= kOfPixel, "statistics must be in [0, 3]");
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  if (statistics <= kOfBatch) return as_dense(x);
  return is_channels_last(x) ? x : as_contiguous(x);
}

Norms norms_of(const Tensor& x, int64_t statistics) {
  const int64_t size = x.numel(), channels = x.size(1), batch = x.size(0);
  if (statistics <= kOfBatch) {
    // The stride of a dimension of one element says nothing.
    const int64_t inner = channels == 1 ? std::max<int64_t>(1, size) : x.stride(1);
    return {1, size / std::max<int64_t>(1, channels * inner), channels, inner};
  }
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  const bool innermost = positions == 1 || is_channels_last(x);
  if (statistics == kOfSample)
    return innermost ? Norms{batch, positions, channels, 1}
                     : Norms{1, 1, batch * channels, positions};
  return innermost ? Norms{1, 1, batch * positions, channels}
                   : Norms{batch, channels, positions, 1};
}

ScalarType sums_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the type that x is computed in.
template <class F>
void with_arithmetic(const Tensor& x, F&& f) {
  dispatch(x, "x", [](auto) {});  // refuses what is not floating
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// ---- the activation, buffer by buffer
// ------------------------------------------------------------

template <class A>
struct Activation {
  int64_t number;
  A gain, alpha;
};

// z := gain * act(z)
template <class A>
void apply(const Activation<A>& act, Buffer<A>& z, int64_t size) {
  with_act(act.number, [&]<Act a>(std::integral_constant<Act, a>) {
    for (int64_t i = 0; i < size; i += kLanes<A>)
      store(z.at + i, activate<a, A>(load(z.at + i), act.alpha) * act.gain);
  });
}

// z := gain * act'(z)
template <class A>
void slopes(const Activation<A>& act, Buffer<A>& z, int64_t size) {
  with_act(act.number, [&]<Act a>(std::integral_constant<Act, a>) {
    for (int64_t i = 0; i < size; i += kLanes<A>)
      store(z.at + i, slope<a, A>(load(z.at + i), act.alpha) * act.gain);
  });
}

// z := gain * act'(z), and curved := gain * act''(z)
template <class A>
void slopes(const Activation<A>& act, Buffer<A>& z, Buffer<A>& curved, int64_t size) {
  with_act(act.number, [&]<Act a>(std::integral_constant<Act, a>) {
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Vec<A> v = load(z.at + i);
      store(z.at + i, slope<a, A>(v, act.alpha) * act.gain);
      store(curved.at + i, curvature<a, A>(v, act.alpha) * act.gain);
    }
  });
}

// ---- what the three directions share
// -------------------------------------------------------------

// What every element needs of its norm. Further values of a direction follow.
enum Value { kMean, kRstd, kScale, kBias, kValues };

template <class A, int V>
struct Call {
  Norms norms;
  Values<A, V> values;
  std::vector<double> weight, rstd;
  Activation<A> act;
  // Of the elements that a norm's statistics were made of, 1 / their number; 0 where they are
  // given, and for the mean of pixels, which have none.
  double share, mean_share;

  Call(const Tensor& x, const Optional& mean, const Optional& var, const Optional& weight_in,
       const Optional& bias, int64_t statistics, double eps, Activation<A> activation)
      : norms(norms_of(x, statistics)),
        values(norms.total()),
        weight(norms.total()),
        rstd(norms.total()),
        act(activation),
        share(statistics == kGiven || norms.count() == 0 ? 0.0 : 1.0 / norms.count()),
        mean_share(statistics == kOfPixel ? 0.0 : share) {
    const int64_t n = norms.total();
    channel_values<A>(mean, n, "mean", 0, values.row(kMean));
    channel_values<double>(weight_in, n, "weight", 1, weight.data());
    channel_values<double>(var, n, "var", 1, rstd.data());
    channel_values<A>(bias, n, "bias", 0, values.row(kBias));
    for (int64_t i = 0; i < n; ++i) set_rstd(i, 1 / std::sqrt(rstd[i] + eps));
  }
  void set_rstd(int64_t norm, double value) {
    rstd[norm] = value;
    values.row(kRstd)[norm] = static_cast<A>(value);
    values.row(kScale)[norm] = static_cast<A>(value * weight[norm]);
  }
  void set(int value, int64_t norm, double to) { values.row(value)[norm] = static_cast<A>(to); }

  // x := x - mean, and z := normalised x * weight + bias
  void centre(const Tile& tile, Buffer<A>& x, Buffer<A>& z) const {
    for_tile<A>(tile, values, [&](int64_t i, const Vec<A>* at) __attribute__((always_inline)) {
      const Vec<A> centred = load(x.at + i) - at[kMean];
      store(x.at + i, centred);
      store(z.at + i, centred * at[kScale] + at[kBias]);
    });
  }
};

void check_gradient(const Tensor& grad, const Tensor& x) {
  require(same_shape(grad, x), "gradients must have the shape of x");
  require(grad.scalar_type() == x.scalar_type(), "gradients must have the dtype of x");
}

// (y, mean, var), with an entry for each norm: empty where they were given, the mean also of
// pixels.
std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x_in, const Optional& running_mean,
                                            const Optional& running_var, const Optional& weight,
                                            const Optional& bias, int64_t statistics, double eps,
                                            int64_t act, double gain, double alpha) {
  const Tensor x = in_layout(x_in, statistics);
  const bool given = statistics == kGiven;
  require(!given || (running_mean && running_var), "running_mean and running_var must be given");
  const Norms norms = norms_of(x, statistics);
  for (const Optional* running : {&running_mean, &running_var})
    require(!*running || ((*running)->dim() == 1 && (*running)->size(0) == norms.total()),
            "running_mean and running_var must have shape (", norms.total(), ",)");
  require(given || norms.total() == 0 || norms.count() > (statistics == kOfPixel ? 0 : 1),
          "x must have 2 values for each mean");
  Tensor y = empty_like_dense(x);
  Tensor mean = empty({given || statistics == kOfPixel ? 0 : norms.total()}, sums_type(x));
  Tensor var = empty({given ? 0 : norms.total()}, sums_type(x));
  with_arithmetic(x, [&]<class A>(A) {
    const Optional none;
    Call<A, kValues> call(x, given ? running_mean : none, given ? running_var : none, weight, bias,
                          statistics, eps, {act, A(gain), A(alpha)});
    const Stream<A> in = stream_of<A>(x), out = stream_of<A>(y);
    const auto write = [&](const Tile& tile) {
      Buffer<A> values, z;
      in.load(tile, values);
      call.centre(tile, values, z);
      apply(call.act, z, tile.size<A>());
      out.store(tile, z);
    };
    if (given) return for_all_tiles<A>(norms, write);
    std::vector<double> shift(norms.total() + kLanes<A>);
    if (statistics != kOfPixel && x.numel())
      for (int64_t i = 0; i < norms.total(); ++i)
        shift[i] = in.value(
            (i / norms.channels * norms.rows * norms.channels + i % norms.channels) * norms.inner);
    const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
      Buffer<A> values;
      in.load(tile, values);
      add_deviations(tile, values, shift.data() + tile.norm(), sums, columns);
    };
    A *means = mutable_data<A>(mean), *vars = mutable_data<A>(var);
    const auto finish = [&](int64_t norm, const double* sums) {
      const double offset = statistics == kOfPixel ? 0 : sums[0] * call.mean_share;
      const double square = sums[1] * call.share - offset * offset;
      vars[norm] = static_cast<A>(square < 0 ? 0 : square);
      call.set_rstd(norm, 1 / std::sqrt(vars[norm] + eps));
      if (statistics == kOfPixel) return;
      means[norm] = static_cast<A>(shift[norm] + offset);
      call.set(kMean, norm, means[norm]);
    };
    sum_then_write<A, 2>(norms, sum, finish, write);
  });
  return {y, mean, var};
}

// With n the normalised x, z = n weight + bias, g = dy act'(z) gain:
//   dbias = sum g, dweight = sum g n, dx = weight rstd (g - mean g - n mean(g n))
// where the last terms are those of the statistics, and absent where these do not depend on x.
std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& dy_in, const Tensor& x_in,
                                                     const Optional& mean, const Tensor& var,
                                                     const Optional& weight, const Optional& bias,
                                                     int64_t statistics, double eps, int64_t act,
                                                     double gain, double alpha) {
  const Tensor x = in_layout(x_in, statistics);
  check_gradient(dy_in, x);
  const Tensor dy = in_order_of(dy_in, x);
  Tensor dx = empty_like_dense(x);
  std::vector<double> dweight, dbias;
  with_arithmetic(x, [&]<class A>(A) {
    enum { kMeanG = kValues, kSlopeX, kAll };
    Call<A, kAll> call(x, mean, var, weight, bias, statistics, eps, {act, A(gain), A(alpha)});
    dweight.resize(call.norms.total());
    dbias.resize(call.norms.total());
    const Stream<A> grad = stream_of<A>(dy), in = stream_of<A>(x), out = stream_of<A>(dx);
    const auto load_tile = [&](const Tile& tile, Buffer<A>& centred, Buffer<A>& g) {
      Buffer<A> s;
      in.load(tile, centred);
      grad.load(tile, g);
      call.centre(tile, centred, s);
      slopes(call.act, s, tile.size<A>());
      for (int64_t i = 0; i < tile.size<A>(); i += kLanes<A>)
        store(g.at + i, load(g.at + i) * load(s.at + i));
    };
    const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
      Buffer<A> centred, g;
      load_tile(tile, centred, g);
      add_tile<A, 2>(tile, call.values, sums, columns,
                     [&](int64_t i, const Vec<A>*, Vec<A>* to) __attribute__((always_inline)) {
                       to[0] += load(g.at + i);
                       to[1] += load(g.at + i) * load(centred.at + i);
                     });
    };
    const auto finish = [&](int64_t norm, const double* sums) {
      dbias[norm] = sums[0];
      dweight[norm] = sums[1] * call.rstd[norm];
      call.set(kMeanG, norm, sums[0] * call.mean_share);
      call.set(kSlopeX, norm, dweight[norm] * call.share * call.rstd[norm]);
    };
    const auto write = [&](const Tile& tile) {
      Buffer<A> centred, g;
      load_tile(tile, centred, g);
      for_tile<A>(tile, call.values,
                  [&](int64_t i, const Vec<A>* at) __attribute__((always_inline)) {
                    const Vec<A> rest = load(g.at + i) - at[kMeanG];
                    store(g.at + i, (rest - load(centred.at + i) * at[kSlopeX]) * at[kScale]);
                  });
      out.store(tile, g);
    };
    sum_then_write<A, 2>(call.norms, sum, finish, write);
  });
  return {dx, like_parameter(dweight, weight, x.scalar_type()),
          like_parameter(dbias, bias, x.scalar_type())};
}

// The gradient of <gg, dx> + <gg_weight, dweight> + <gg_bias, dbias>. With the names above,
//   u = d/dg = scale (gg - mean gg - n mean(gg n)) + gg_weight n + gg_bias     scale = weight rstd
//   h = d/dz = u dy act''(z) gain
//   v = d/dn = weight h - scale mean(g n) gg + (gg_weight - scale mean(gg n)) g
//   d/dscale = sum(gg g) - (sum gg sum g + sum(gg n) sum(g n)) / count
// grad_dy = u act'(z) gain, and grad_x takes v and d/dscale through the norm. Ten sums over the
// norm, five where act'' = 0, decide all that the pass to write needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_double_backward(
    const Tensor& gg_in, const Optional& gg_weight, const Optional& gg_bias, const Tensor& dy_in,
    const Tensor& x_in, const Optional& mean, const Tensor& var, const Optional& weight,
    const Optional& bias, int64_t statistics, double eps, int64_t act, double gain, double alpha) {
  const Tensor x = in_layout(x_in, statistics);
  check_gradient(gg_in, x);
  check_gradient(dy_in, x);
  const Tensor gg = in_order_of(gg_in, x), dy = in_order_of(dy_in, x);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  std::vector<double> grad_weight, grad_bias;
  with_arithmetic(x, [&]<class A>(A) {
    enum {
      kMeanGG = kValues,
      kSlopeGG,
      kToWeight,
      kToBias,
      kByGG,
      kByG,
      kOwn,
      kMeanV,
      kSlopeX,
      kAll
    };
    Call<A, kAll> call(x, mean, var, weight, bias, statistics, eps, {act, A(gain), A(alpha)});
    const int64_t total = call.norms.total();
    std::vector<double> to_weight(total), to_bias(total);
    channel_values<double>(gg_weight, total, "grad_grad_weight", 0, to_weight.data());
    channel_values<double>(gg_bias, total, "grad_grad_bias", 0, to_bias.data());
    grad_weight.resize(total);
    grad_bias.resize(total);
    const Stream<A> outer = stream_of<A>(gg), grad = stream_of<A>(dy), in = stream_of<A>(x);
    const Stream<A> out_dy = stream_of<A>(grad_dy), out_x = stream_of<A>(grad_x);
    // k = dy act''(z) gain
    struct Buffers {
      Buffer<A> centred, gg, g, s, k;
    };
    const auto load_tile = [&]<bool curved>(const Tile& tile, Buffers& b,
                                            std::bool_constant<curved>) {
      in.load(tile, b.centred);
      grad.load(tile, b.g);
      outer.load(tile, b.gg);
      call.centre(tile, b.centred, b.s);
      const int64_t size = tile.size<A>();
      curved ? slopes(call.act, b.s, b.k, size) : slopes(call.act, b.s, size);
      for (int64_t i = 0; i < size; i += kLanes<A>) {
        const Vec<A> dy = load(b.g.at + i);
        store(b.g.at + i, dy * load(b.s.at + i));
        if (curved) store(b.k.at + i, dy * load(b.k.at + i));
      }
    };
    enum { kG, kGx, kGG, kGGx, kGGg, kK, kKx, kKxx, kKgg, kKggx, kSums };
    const auto run = [&]<bool curved>(std::bool_constant<curved> is_curved) {
      const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
        Buffers b;
        load_tile(tile, b, is_curved);
        const auto add = [&](int64_t i, const Vec<A>*, Vec<A>* to) __attribute__((always_inline)) {
          const Vec<A> x = load(b.centred.at + i), gg = load(b.gg.at + i), g = load(b.g.at + i);
          to[kG] += g;
          to[kGx] += g * x;
          to[kGG] += gg;
          to[kGGx] += gg * x;
          to[kGGg] += gg * g;
          if constexpr (curved) {
            const Vec<A> k = load(b.k.at + i), kx = k * x;
            to[kK] += k;
            to[kKx] += kx;
            to[kKxx] += kx * x;
            to[kKgg] += k * gg;
            to[kKggx] += kx * gg;
          }
        };
        add_tile<A, curved ? kSums : kK>(tile, call.values, sums, columns, add);
      };
      const auto finish = [&](int64_t norm, const double* s) {
        const double w = call.weight[norm], rstd = call.rstd[norm], scale = w * rstd;
        const double share = call.share, mean_share = call.mean_share;
        const double gn = s[kGx] * rstd, ggn = s[kGGx] * rstd;
        const double by_gg = -scale * share * gn, by_g = to_weight[norm] - scale * share * ggn;
        const double to_scale = s[kGGg] - mean_share * s[kGG] * s[kG] - share * ggn * gn;
        double h = 0, hn = 0;  // sums of h and of h n
        if constexpr (curved) {
          const double u0 = to_bias[norm] - scale * mean_share * s[kGG];
          h = scale * s[kKgg] + u0 * s[kK] + by_g * rstd * s[kKx];
          hn = rstd * (scale * s[kKggx] + u0 * s[kKx] + by_g * rstd * s[kKxx]);
        }
        const double v = by_gg * s[kGG] + by_g * s[kG] + w * h;
        const double vn = by_gg * ggn + by_g * gn + w * hn;
        call.set(kMeanGG, norm, mean_share * s[kGG]);
        call.set(kSlopeGG, norm, share * ggn * rstd);
        call.set(kToWeight, norm, to_weight[norm] * rstd);
        call.set(kToBias, norm, to_bias[norm]);
        call.set(kByGG, norm, by_gg);
        call.set(kByG, norm, by_g);
        call.set(kOwn, norm, w);
        call.set(kMeanV, norm, mean_share * v);
        call.set(kSlopeX, norm, share * (vn + scale * to_scale) * rstd);
        grad_weight[norm] = rstd * to_scale + hn;
        grad_bias[norm] = h;
      };
      const auto write = [&](const Tile& tile) {
        Buffers b;
        load_tile(tile, b, is_curved);
        const auto element = [&](int64_t i, const Vec<A>* at) __attribute__((always_inline)) {
          const Vec<A> x = load(b.centred.at + i), gg = load(b.gg.at + i);
          Vec<A> u = (gg - at[kMeanGG] - x * at[kSlopeGG]) * at[kScale];
          u += x * at[kToWeight] + at[kToBias];
          Vec<A> v = gg * at[kByGG] + load(b.g.at + i) * at[kByG];
          if constexpr (curved) v += u * load(b.k.at + i) * at[kOwn];
          store(b.g.at + i, u * load(b.s.at + i));
          store(b.gg.at + i, (v - at[kMeanV] - x * at[kSlopeX]) * at[kRstd]);
        };
        for_tile<A>(tile, call.values, element);
        out_dy.store(tile, b.g);
        out_x.store(tile, b.gg);
      };
      sum_then_write<A, curved ? kSums : kK>(call.norms, sum, finish, write);
    };
    act > static_cast<int64_t>(Act::lrelu) ? run(std::true_type{}) : run(std::false_type{});
  });
  return {grad_dy, grad_x, like_parameter(grad_weight, weight, x.scalar_type()),
          like_parameter(grad_bias, bias, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("norm_act_double_backward", TORCH_BOX(&norm_act_double_backward));
}

}  // namespace
}  // namespace aigc_fast

// The derivative of norm_act's backward, which is what a gradient penalty takes.
#include "norm_act.h"

namespace aigc_fast {
namespace {

// The gradient of <gg, dx> + <gg_weight, dweight> + <gg_bias, dbias>. With the names of
// norm_act_backward,
//   u = d/dg = scale (gg - mean gg - n mean(gg n)) + gg_weight n + gg_bias     scale = weight rstd
//   h = d/dz = u dy act''(z) gain
//   v = d/dn = weight h - scale mean(g n) gg + (gg_weight - scale mean(gg n)) g
//   d/dscale = sum(gg g) - (sum gg sum g + sum(gg n) sum(g n)) / count
// grad_dy = u act'(z) gain, and grad_x takes v and d/dscale through the norm. Ten sums over the
// norm, five where act'' = 0, decide all that the pass to write needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_double_backward(
    const Tensor& gg_in, const MaybeTensor& gg_weight, const MaybeTensor& gg_bias,
    const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& mean, const Tensor& var,
    const MaybeTensor& weight, const MaybeTensor& bias, int64_t statistics, double eps, int64_t act,
    double gain, double alpha) {
  const Tensor x = in_layout(x_in, statistics);
  check_like(gg_in, x, "grad_grad");
  check_like(dy_in, x, "grad_output");
  const Tensor gg = in_order_of(gg_in, x), dy = in_order_of(dy_in, x);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  std::vector<double> grad_weight, grad_bias;
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
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
    NormCall<A, kAll> call(x, mean, var, weight, bias, statistics, eps);
    const int64_t total = call.norms.total();
    std::vector<double> to_weight(total), to_bias(total);
    channel_values<double>(gg_weight, total, "grad_grad_weight", 0, to_weight.data());
    channel_values<double>(gg_bias, total, "grad_grad_bias", 0, to_bias.data());
    grad_weight.resize(total);
    grad_bias.resize(total);
    const Places<T, 3, 0> in{{data<T>(x), data<T>(dy), data<T>(gg)}, {}};
    const Places<T, 3, 2> places{in.in, {mutable_data<T>(grad_dy), mutable_data<T>(grad_x)}};
    enum { kG, kGx, kGG, kGGx, kGGg, kK, kKx, kKxx, kKgg, kKggx, kSums };
    with_act(act, [&]<Act kind>(std::integral_constant<Act, kind>) {
      constexpr bool curved = kind > Act::lrelu;
      constexpr int count = curved ? kSums : kK;
      // k = dy act''(z) gain
      const auto slopes = [gain = A(gain),
                           alpha = A(alpha)](Vec<A> z) __attribute__((always_inline)) {
        return std::pair(slope<kind, A>(z, alpha) * gain, curvature<kind, A>(z, alpha) * gain);
      };
      const auto add = [=](auto& in, auto& at, auto&, Vec<A>* to) __attribute__((always_inline)) {
        const auto [x, z] = Centred<A>(in[0], at);
        const auto [first, second] = slopes(z);
        const Vec<A> g = in[1] * first, gg = in[2];
        to[kG] += g;
        to[kGx] += g * x;
        to[kGG] += gg;
        to[kGGx] += gg * x;
        to[kGGg] += gg * g;
        if constexpr (curved) {
          const Vec<A> k = in[1] * second, kx = k * x;
          to[kK] += k;
          to[kKx] += kx;
          to[kKxx] += kx * x;
          to[kKgg] += k * gg;
          to[kKggx] += kx * gg;
        }
      };
      const auto sum = [&](const Tile& tile, double* sums, int64_t columns) {
        map_tile<count>(tile, call.values, in, sums, columns, add);
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
      const auto element = [=](auto& in, auto& at, auto& out, Vec<A>*)
                               __attribute__((always_inline)) {
                                 const auto [x, z] = Centred<A>(in[0], at);
                                 const auto [first, second] = slopes(z);
                                 const Vec<A> dy = in[1], gg = in[2];
                                 Vec<A> u = (gg - at[kMeanGG] - x * at[kSlopeGG]) * at[kScale];
                                 u += x * at[kToWeight] + at[kToBias];
                                 Vec<A> v = gg * at[kByGG] + dy * first * at[kByG];
                                 if constexpr (curved) v += u * (dy * second) * at[kOwn];
                                 out[0] = u * first;
                                 out[1] = (v - at[kMeanV] - x * at[kSlopeX]) * at[kRstd];
                               };
      const auto write = [&](const Tile& tile) { map_tile(tile, call.values, places, element); };
      sum_then_write(call.norms, count, sum, for_norms<count>(finish), write);
    });
  });
  return {grad_dy, grad_x, like_parameter(grad_weight, weight, x.scalar_type()),
          like_parameter(grad_bias, bias, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("norm_act_double_backward", TORCH_BOX(&norm_act_double_backward));
}

}  // namespace
}  // namespace aigc_fast

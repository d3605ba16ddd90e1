// y = clamp(gain * act(z), -limit, limit) with z = x * scale + noise * strength + bias, its
// backward and double backward. act is linear, relu or lrelu: z below zero is multiplied by alpha.
//
// x is (batch, channels, pixels). A contiguous one is rows of pixels that share scale and bias, and
// meet one row of the noise; with channels_last every pixel is a row of channels, and its noise one
// number. All derivatives compute z anew from x, which the gradient of scale needs in any case.
#include "scale_bias_act.h"

namespace aigc_fast {
namespace {

// `totals` times gain, added up to the size of the parameter (which divides theirs), in its dtype.
Tensor gradient_of(const MaybeTensor& parameter, const std::vector<double>& totals, double gain) {
  std::vector<double> sums(parameter ? parameter->numel() : 0);
  for (size_t i = 0; !sums.empty() && i < totals.size(); ++i) sums[i % sums.size()] += totals[i];
  for (double& sum : sums) sum *= gain;
  return like_parameter(sums, parameter, ScalarType::Float);
}

Tensor arranged(const Tensor& x) {
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  return in_memory_order(x);
}

Tensor scale_bias_act(const Tensor& x_in, const MaybeTensor& scale, const MaybeTensor& noise,
                      const MaybeTensor& strength, const MaybeTensor& bias, double alpha,
                      double gain, std::optional<double> clamp) {
  const Tensor x = arranged(x_in);
  Tensor y = empty_like_dense(x);
  dispatch(x, "x", [&]<class T>(T) {
    const ScaleBiasCall<T> call(x, scale, noise, strength, bias, alpha, gain, clamp);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    using V = Vec<Acc<T>>;
    if (call.only_scale)
      return call.template for_elements<0, 1>(
          {call.scale.data()}, nullptr,
          [in, out](int64_t i, auto lanes, const V* at, V, Wide<Acc<T>>*) {
            store(out + i, load(in + i, lanes) * at[0], lanes);
          });
    call.template for_elements<0, 2>(
        {call.scale.data(), call.bias.data()}, nullptr,
        [&, in, out](int64_t i, auto lanes, const V* at, V n, Wide<Acc<T>>*) {
          const V y = call.activate(call.before_act(load(in + i, lanes), at[0], n, at[1]));
          store(out + i, clamp_to<Acc<T>>(y, call.limit), lanes);
        });
  });
  return y;
}

// (dx, dscale, dstrength, dbias): with g = dy * dy/dz these are g * scale, and the sums of g * x,
// g * noise and g.
std::tuple<Tensor, Tensor, Tensor, Tensor> scale_bias_act_backward(
    const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& scale, const MaybeTensor& noise,
    const MaybeTensor& strength, const MaybeTensor& bias, double alpha, double gain,
    std::optional<double> clamp) {
  const Tensor x = arranged(x_in);
  check_like(dy_in, x, "grad_output");
  const Tensor dy = in_order_of(dy_in, x);
  Tensor dx = empty_like_dense(x);
  std::vector<double> totals;
  dispatch(x, "x", [&]<class T>(T) {
    const ScaleBiasCall<T> call(x, scale, noise, strength, bias, alpha, gain, clamp);
    const T *in = data<T>(x), *grad = data<T>(dy);
    T* out = mutable_data<T>(dx);
    using V = Vec<Acc<T>>;
    if (call.only_scale) {
      call.template for_elements<1, 1>(
          {call.scale.data()}, &totals,
          [in, grad, out](int64_t i, auto lanes, const V* at, V, Wide<Acc<T>>* sums) {
            const V g = load(grad + i, lanes);
            store(out + i, g * at[0], lanes);
            sums[0] += widen<Acc<T>>(g) * widen<Acc<T>>(load(in + i, lanes));
          });
      return totals.resize(3 * totals.size());
    }
    call.template for_elements<3, 2>(
        {call.scale.data(), call.bias.data()}, &totals,
        [&, in, grad, out](int64_t i, auto lanes, const V* at, V n, Wide<Acc<T>>* sums) {
          const V x = load(in + i, lanes);
          const V g = load(grad + i, lanes) * call.slope(call.before_act(x, at[0], n, at[1]));
          store(out + i, g * (at[0] * call.gain), lanes);
          const auto wide = widen<Acc<T>>(g);
          sums[0] += wide * widen<Acc<T>>(x);
          sums[1] += wide * widen<Acc<T>>(n);
          sums[2] += wide;
        });
  });
  const auto second = totals.begin() + totals.size() / 3, third = second + totals.size() / 3;
  return {dx, gradient_of(scale, {totals.begin(), second}, gain),
          gradient_of(strength, {second, third}, gain),
          gradient_of(bias, {third, totals.end()}, gain)};
}

// The results of backward are the derivative of sum(g u), where u = gg_x * scale + x * gg_scale +
// noise * gg_strength + gg_bias is what z changes by. z itself is not bent, so that the gradients
// of it are (dy/dz * u, g * gg_scale, the sums of g * gg_x) for dy, x and scale.
std::tuple<Tensor, Tensor, Tensor> scale_bias_act_double_backward(
    const MaybeTensor& gg_x_in, const MaybeTensor& gg_scale, const MaybeTensor& gg_strength,
    const MaybeTensor& gg_bias, const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& scale,
    const MaybeTensor& noise, const MaybeTensor& strength, const MaybeTensor& bias, double alpha,
    double gain, std::optional<double> clamp) {
  const Tensor x = arranged(x_in);
  check_like(dy_in, x, "grad_output");
  if (gg_x_in) check_like(*gg_x_in, x, "grad_grad");
  const Tensor dy = in_order_of(dy_in, x), gg_x = gg_x_in ? in_order_of(*gg_x_in, x) : x;
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  std::vector<double> totals;
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    using V = Vec<A>;
    const ScaleBiasCall<T> call(x, scale, noise, strength, bias, alpha, gain, clamp);
    const std::vector<A> to_scale = call.of_channels(gg_scale, "grad_scale", call.batch, 0);
    const std::vector<A> to_bias = call.of_channels(gg_bias, "grad_bias", 1, 0);
    const A to_strength = gg_strength ? values<A>(*gg_strength, "grad_strength").at(0) : 0;
    const T *in = data<T>(x), *grad = data<T>(dy), *to_x = gg_x_in ? data<T>(gg_x) : nullptr;
    T *out = mutable_data<T>(grad_dy), *out_x = mutable_data<T>(grad_x);
    call.template for_elements<1, 4>(
        {call.scale.data(), call.bias.data(), to_scale.data(), to_bias.data()}, &totals,
        [&, in, grad, to_x, out, out_x](int64_t i, auto lanes, const V* at, V n, Wide<A>* sums) {
          const V x = load(in + i, lanes), v = to_x ? load(to_x + i, lanes) : V{};
          const V slope = call.slope(call.before_act(x, at[0], n, at[1]));
          const V g = load(grad + i, lanes) * slope;
          const V u = v * at[0] + x * at[2] + (n * to_strength + at[3]);
          store(out + i, slope * (u * call.gain), lanes);
          store(out_x + i, g * (at[2] * call.gain), lanes);
          sums[0] += widen<A>(g) * widen<A>(v);
        });
  });
  return {grad_dy, grad_x, gradient_of(scale, totals, gain)};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("scale_bias_act", TORCH_BOX(&scale_bias_act));
  m.impl("scale_bias_act_backward", TORCH_BOX(&scale_bias_act_backward));
  m.impl("scale_bias_act_double_backward", TORCH_BOX(&scale_bias_act_double_backward));
}

}  // namespace
}  // namespace aigc_fast

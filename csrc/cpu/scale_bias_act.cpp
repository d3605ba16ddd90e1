// y = clamp(gain * act(z), -limit, limit) with z = x * scale + noise * strength + bias, its
// backward and double backward. act is linear, relu or lrelu: z below zero is multiplied by alpha.
//
// x is (batch, channels, pixels). A contiguous one is rows of pixels that share scale and bias, and
// meet one row of the noise; with channels_last every pixel is a row of channels, and its noise one
// number. All derivatives compute z anew from x, which the gradient of scale needs in any case.
#include "channels.h"
#include "clamp.h"
#include "memory_order.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Elements of a unit of work; units depend on the shape alone, so that sums come out the same for
// any number of threads.
constexpr int64_t kUnit = 16384, kMinPixels = 32;
// Pixels whose sums stay in registers where a pixel is a row of channels.
constexpr int64_t kRun = 8;

// A parameter's values in the type of the arithmetic.
template <class A>
std::vector<A> values(const Tensor& parameter, const char* name) {
  std::vector<A> result(parameter.numel());
  const Tensor dense = as_contiguous(parameter);
  dispatch(dense, name, [&]<class P>(P) {
    if constexpr (std::is_same_v<Acc<P>, A>)
      convert(data<P>(dense), result.size(), result.data());
    else
      require(false, name, " must be float64 if x is, and only then");
  });
  return result;
}

// `totals` times gain, added up to the size of the parameter (which divides theirs), in its dtype.
Tensor gradient_of(const MaybeTensor& parameter, const std::vector<double>& totals, double gain) {
  std::vector<double> sums(parameter ? parameter->numel() : 0);
  for (size_t i = 0; !sums.empty() && i < totals.size(); ++i) sums[i % sums.size()] += totals[i];
  for (double& sum : sums) sum *= gain;
  return like_parameter(sums, parameter, ScalarType::Float);
}

// What the three directions know of a call.
template <class T>
struct Call {
  using A = Acc<T>;
  int64_t batch, channels, pixels;
  bool last;
  std::vector<A> scale, bias, noise;
  bool noise_per_sample;
  A strength, alpha, gain, limit;
  bool only_scale;  // y = x * scale: before a convolution

  Call(const Tensor& x, const MaybeTensor& scale_in, const MaybeTensor& noise_in,
       const MaybeTensor& strength_in, const MaybeTensor& bias_in, double alpha, double gain,
       std::optional<double> clamp)
      : batch(x.size(0)),
        channels(x.size(1)),
        pixels(positions_of(x)),
        last(is_channels_last(x)),
        strength(1),
        alpha(A(alpha)),
        gain(A(gain)),
        limit(limit_of<A>(clamp)),
        only_scale(!noise_in && !bias_in && alpha == 1 && gain == 1 && !clamp) {
    scale = of_channels(scale_in, "scale", batch, 1);
    bias = of_channels(bias_in, "bias", 1, 0);
    if (noise_in) {
      noise = values<A>(*noise_in, "noise");
      const int64_t size = noise.size();
      noise_per_sample = size == batch * pixels;
      require(noise_per_sample || size == pixels, "noise must have a value for each pixel");
    }
    if (strength_in) {
      require(noise_in && strength_in->numel() == 1,
              "strength must have one element, beside noise");
      strength = values<A>(*strength_in, "strength")[0];
    }
  }

  // A value for each sample and channel: [batch][channels].
  std::vector<A> of_channels(const MaybeTensor& p, const char* name, int64_t rows,
                             A missing) const {
    if (!p) return std::vector<A>(batch * channels, missing);
    require(p->numel() == rows * channels, name, " must have ", rows * channels, " elements");
    std::vector<A> result = values<A>(*p, name);
    result.resize(batch * channels);
    for (size_t i = rows * channels; i < result.size(); ++i) result[i] = result[i - channels];
    return result;
  }

  const A* noise_of(int64_t sample) const {
    return noise.empty() ? nullptr : noise.data() + (noise_per_sample ? sample * pixels : 0);
  }
  AIGC_INLINE Vec<A> before_act(Vec<A> x, Vec<A> scale, Vec<A> noise, Vec<A> bias) const {
    return x * scale + (noise * strength + bias);
  }
  AIGC_INLINE Vec<A> activate(Vec<A> z) const {
    const Vec<A> below = alpha == 0 ? Vec<A>{} : z * alpha;  // relu of -inf is 0
    return (z < 0 ? below : z) * gain;
  }
  // dy/dz / gain. Sums are multiplied by the gain at their end, in double: so their terms are
  // rounded once less, where z > 0.
  AIGC_INLINE Vec<A> slope(Vec<A> z) const {
    const Vec<A> d = z > 0 ? broadcast(A(1)) : broadcast(alpha);
    return abs<A>(activate(z)) > limit ? Vec<A>{} : d;
  }

  // Calls f(i, lanes, at, noise, sums) for the vectors of elements i, i + 1, ... of x in memory
  // order, in parallel. `at` holds those of the V arrays of [batch][channels]; what f adds to its
  // N sums is added up in `totals`, N arrays of the same kind.
  template <int N, int V, class F>
  void for_elements(std::array<const A*, V> arrays, std::vector<double>* totals, F f) const {
    if (N) totals->assign(N * batch * channels, 0.0);
    if (batch * channels * pixels == 0) return;
    last ? by_pixels<N, V>(arrays, totals, f) : by_channels<N, V>(arrays, totals, f);
  }

  template <int N, int V, class F>
  void by_channels(std::array<const A*, V> arrays, std::vector<double>* totals, F f) const {
    const int64_t rows = batch * channels, pieces = (pixels + kUnit - 1) / kUnit;
    const int64_t grain = grain_of(pixels);
    std::vector<double> parts(N * rows * pieces);
    torch::stable::parallel_for(0, rows * pieces, grain, [&](int64_t begin, int64_t end) {
      const F own = f;  // in registers, whatever the stores may alias
      for (int64_t u = begin; u < end; ++u) {
        const int64_t row = u / pieces, start = u % pieces * kUnit, first = row * pixels + start;
        const A* of_row = noise_of(row / channels);
        Vec<A> at[V];
        Wide<A> sums[N + 1];
        for (int v = 0; v < V; ++v) at[v] = broadcast(arrays[v][row]);
        for_vectors<A>(std::min(kUnit, pixels - start), [&](int64_t j, auto lanes) {
          const Vec<A> n = of_row ? load(of_row + start + j, lanes) : Vec<A>{};
          own(first + j, lanes, at, n, sums);
        });
        for (int s = 0; s < N; ++s) parts[(s * rows + row) * pieces + u % pieces] = sums[s].sum();
      }
    });
    for (size_t i = 0; i < parts.size(); ++i) (*totals)[i / pieces] += parts[i];
  }

  template <int N, int V, class F>
  void by_pixels(std::array<const A*, V> arrays, std::vector<double>* totals, F f) const {
    const int64_t height = std::max(kMinPixels, kUnit / channels);
    const int64_t pieces = (pixels + height - 1) / height;
    const int64_t grain = grain_of(std::min(height, pixels) * channels);
    std::vector<double> parts(N * batch * pieces * channels);
    torch::stable::parallel_for(0, batch * pieces, grain, [&](int64_t begin, int64_t end) {
      const F own = f;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t sample = u / pieces, first = u % pieces * height;
        const int64_t past = std::min(pixels, first + height);
        const A* of_pixel = noise_of(sample);
        for (int64_t start = first; start < past; start += kRun)
          for_vectors<A>(channels, [&](int64_t j, auto lanes) {
            Vec<A> at[V];
            Wide<A> sums[N + 1];
            for (int v = 0; v < V; ++v) at[v] = load(arrays[v] + sample * channels + j, lanes);
            for (int64_t p = start; p < std::min(past, start + kRun); ++p) {
              const Vec<A> n = of_pixel ? broadcast(of_pixel[p]) : Vec<A>{};
              own((sample * pixels + p) * channels + j, lanes, at, n, sums);
            }
            for (int s = 0; s < N; ++s)
              add_to(parts.data() + (u * N + s) * channels + j, sums[s], lanes);
          });
      }
    });
    for (int64_t u = 0; u < batch * pieces * N; ++u)
      for (int64_t c = 0; c < channels; ++c)
        (*totals)[(u % N * batch + u / N / pieces) * channels + c] += parts[u * channels + c];
  }
};

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
    const Call<T> call(x, scale, noise, strength, bias, alpha, gain, clamp);
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
    const Call<T> call(x, scale, noise, strength, bias, alpha, gain, clamp);
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
    const Call<T> call(x, scale, noise, strength, bias, alpha, gain, clamp);
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

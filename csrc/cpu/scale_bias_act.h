// What forward, backward and double backward of scale_bias_act.cpp know of a call, and their walk
// over its elements.
#pragma once

#include "channels.h"
#include "clamp.h"
#include "memory_order.h"
#include "sums.h"

namespace aigc_fast {

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

template <class T>
struct ScaleBiasCall {
  using A = Acc<T>;
  int64_t batch, channels, pixels;
  bool last;
  std::vector<A> scale, bias, noise;
  bool noise_per_sample;
  A strength, alpha, gain, limit;
  bool only_scale;  // y = x * scale: before a convolution

  ScaleBiasCall(const Tensor& x, const MaybeTensor& scale_in, const MaybeTensor& noise_in,
                const MaybeTensor& strength_in, const MaybeTensor& bias_in, double alpha,
                double gain, std::optional<double> clamp)
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

}  // namespace aigc_fast

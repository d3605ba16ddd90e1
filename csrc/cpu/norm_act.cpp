// y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) for every norm of x, and its
// backward: sums over each norm, a few numbers made of them, and one pass to write.
#include "norm_act.h"

namespace aigc_fast {
namespace {

// The mean and the variance of each norm, from sums about its first element in fp64: a large mean
// costs no digits. Without a mean, as of pixels, the squares themselves are summed.
template <class T>
struct Deviations {
  using A = Acc<T>;
  Places<T, 1, 0> places;
  Values<A, 1> shift;
  bool squares;

  Deviations(const T* x, const Norms& norms, bool squares = false)
      : places{{x}, {}}, shift(norms.total()), squares(squares) {
    const auto& [samples, rows, channels, inner] = norms;
    if (squares || norms.count() == 0) return;
    for (int64_t i = 0; i < norms.total(); ++i)
      shift.row(0)[i] = load_one(x + (i / channels * rows * channels + i % channels) * inner);
  }
  void operator()(const Tile& tile, double* sums, int64_t columns) const {
    const auto add_square = [](auto& x, auto&, auto&, Vec<A>* to)
                                __attribute__((always_inline)) { to[0] += x[0] * x[0]; };
    const auto add = [](auto& x, auto& shift, auto&, Wide<A>* to) __attribute__((always_inline)) {
      const Wide<A> from = widen<A>(x[0]), base = widen<A>(shift[0]);
      for (int h = 0; h < Wide<A>::kHalves; ++h) {
        const Vec<double> d = from.half[h] - base.half[h];
        to[0].half[h] += d;
        to[1].half[h] += d * d;
      }
    };
    if (squares)
      map_tile<1>(tile, shift, places, sums + columns, columns, add_square);
    else
      map_tile<2, Wide<A>>(tile, shift, places, sums, columns, add);
  }
  // (mean, variance) of the sums of a norm that has 1 / share elements.
  std::pair<A, A> finish(int64_t norm, const double* sums, double share) const {
    const double offset = sums[0] * share;
    const double square = sums[1] * share - offset * offset;
    return {static_cast<A>(shift.row(0)[norm] + offset), static_cast<A>(square < 0 ? 0 : square)};
  }
};

// (mean, var) of each channel; zero where it has no elements.
std::tuple<Tensor, Tensor> channel_moments(const Tensor& x_in) {
  const Tensor x = in_layout(x_in, kOfBatch);
  const Norms norms = norms_of(x, kOfBatch);
  Tensor mean = empty({norms.total()}, acc_dtype(x)), var = empty({norms.total()}, acc_dtype(x));
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Deviations<T> sum(data<T>(x), norms);
    const double share = 1.0 / std::max<int64_t>(1, norms.count());
    A *means = mutable_data<A>(mean), *vars = mutable_data<A>(var);
    const auto finish = [&](int64_t norm, const double* sums) {
      std::tie(means[norm], vars[norm]) = sum.finish(norm, sums, share);
    };
    sum_then_write(norms, 2, std::cref(sum), for_norms<2>(finish));
  });
  return {mean, var};
}

// (y, mean, var), with an entry for each norm: empty where they were given, the mean also of
// pixels.
std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x_in, const MaybeTensor& running_mean,
                                            const MaybeTensor& running_var,
                                            const MaybeTensor& weight, const MaybeTensor& bias,
                                            int64_t statistics, double eps, int64_t act,
                                            double gain, double alpha) {
  const Tensor x = in_layout(x_in, statistics);
  const bool given = statistics == kGiven;
  require(!given || (running_mean && running_var), "running_mean and running_var must be given");
  const Norms norms = norms_of(x, statistics);
  for (const MaybeTensor* running : {&running_mean, &running_var})
    require(!*running || ((*running)->dim() == 1 && (*running)->size(0) == norms.total()),
            "running_mean and running_var must have shape (", norms.total(), ",)");
  require(given || norms.total() == 0 || norms.count() > (statistics == kOfPixel ? 0 : 1),
          "x must have 2 values for each mean");
  Tensor y = empty_like_dense(x);
  Tensor mean = empty({given || statistics == kOfPixel ? 0 : norms.total()}, acc_dtype(x));
  Tensor var = empty({given ? 0 : norms.total()}, acc_dtype(x));
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const MaybeTensor none;
    NormCall<A, kValues> call(x, given ? running_mean : none, given ? running_var : none, weight,
                              bias, statistics, eps);
    const Places<T, 1, 1> places{{data<T>(x)}, {mutable_data<T>(y)}};
    WriteTile write;
    with_act(act, [&]<Act kind>(std::integral_constant<Act, kind>) {
      const auto element = [gain = A(gain), alpha = A(alpha)](auto& x, auto& at, auto& y, Vec<A>*)
                               __attribute__((always_inline)) {
                                 y[0] = activate<kind, A>(Centred<A>(x[0], at).z, alpha) * gain;
                               };
      write = [=, &call](const Tile& tile) { map_tile(tile, call.values, places, element); };
    });
    if (given) return for_all_tiles(norms, write);
    const Deviations<T> sum(data<T>(x), norms, statistics == kOfPixel);
    A *means = mutable_data<A>(mean), *vars = mutable_data<A>(var);
    const auto finish = [&](int64_t norm, const double* sums) {
      const auto [m, v] = sum.finish(norm, sums, call.share);
      vars[norm] = v;
      call.set_rstd(norm, 1 / std::sqrt(v + eps));
      if (statistics == kOfPixel) return;
      means[norm] = m;
      call.set(kMean, norm, m);
    };
    sum_then_write(norms, 2, std::cref(sum), for_norms<2>(finish), write);
  });
  return {y, mean, var};
}

// With n the normalised x, z = n weight + bias, g = dy act'(z) gain:
//   dbias = sum g, dweight = sum g n, dx = weight rstd (g - mean g - n mean(g n))
// where the last terms are those of the statistics, and absent where these do not depend on x.
std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& dy_in, const Tensor& x_in,
                                                     const MaybeTensor& mean, const Tensor& var,
                                                     const MaybeTensor& weight,
                                                     const MaybeTensor& bias, int64_t statistics,
                                                     double eps, int64_t act, double gain,
                                                     double alpha) {
  const Tensor x = in_layout(x_in, statistics);
  check_like(dy_in, x, "grad_output");
  const Tensor dy = in_order_of(dy_in, x);
  Tensor dx = empty_like_dense(x);
  std::vector<double> dweight, dbias;
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    enum { kMeanG = kValues, kSlopeX, kAll };
    NormCall<A, kAll> call(x, mean, var, weight, bias, statistics, eps);
    dweight.resize(call.norms.total());
    dbias.resize(call.norms.total());
    const Places<T, 2, 0> in{{data<T>(x), data<T>(dy)}, {}};
    const Places<T, 2, 1> places{in.in, {mutable_data<T>(dx)}};
    SumTile sum;
    WriteTile write;
    with_act(act, [&]<Act kind>(std::integral_constant<Act, kind>) {
      const auto g_of =
          [gain = A(gain), alpha = A(alpha)](const Centred<A>& c, Vec<A> dy)
              __attribute__((always_inline)) { return dy * (slope<kind, A>(c.z, alpha) * gain); };
      const auto add = [=](auto& in, auto& at, auto&, Vec<A>* sums) __attribute__((always_inline)) {
        const Centred<A> c(in[0], at);
        const Vec<A> g = g_of(c, in[1]);
        sums[0] += g;
        sums[1] += g * c.x;
      };
      const auto element = [=](auto& in, auto& at, auto& dx,
                               Vec<A>*) __attribute__((always_inline)) {
        const Centred<A> c(in[0], at);
        dx[0] = (g_of(c, in[1]) - at[kMeanG] - c.x * at[kSlopeX]) * at[kScale];
      };
      sum = [=, &call](const Tile& tile, double* sums, int64_t columns) {
        map_tile<2>(tile, call.values, in, sums, columns, add);
      };
      write = [=, &call](const Tile& tile) { map_tile(tile, call.values, places, element); };
    });
    const auto finish = [&](int64_t norm, const double* sums) {
      dbias[norm] = sums[0];
      dweight[norm] = sums[1] * call.rstd[norm];
      call.set(kMeanG, norm, sums[0] * call.mean_share);
      call.set(kSlopeX, norm, dweight[norm] * call.share * call.rstd[norm]);
    };
    sum_then_write(call.norms, 2, sum, for_norms<2>(finish), write);
  });
  return {dx, like_parameter(dweight, weight, x.scalar_type()),
          like_parameter(dbias, bias, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace
}  // namespace aigc_fast

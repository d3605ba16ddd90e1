// y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) for every norm of x, and its
// backward: sums over each norm, a few numbers made of them, and one pass to write.
#include "norm_act.h"

namespace aigc_fast {
namespace {

// How the mean and the variance of each norm are summed: about its first element, so that a large
// mean costs no digits.
template <class A>
struct Deviations {
  Stream<A> in;
  std::vector<double> shift;

  Deviations(const Tensor& x, const Norms& norms, bool about_zero)
      : in(stream_of<A>(x)), shift(norms.total() + kLanes<A>) {
    if (about_zero || !x.numel()) return;
    const auto& [samples, rows, channels, inner] = norms;
    for (int64_t i = 0; i < norms.total(); ++i)
      shift[i] = in.value((i / channels * rows * channels + i % channels) * inner);
  }
  void operator()(const Tile& tile, double* sums, int64_t columns) const {
    Buffer<A> values;
    in.load(tile, values);
    add_deviations(tile, values, shift.data() + tile.norm(), sums, columns);
  }
  // (mean, variance) of the sums of a norm that has 1 / share elements.
  std::pair<A, A> finish(int64_t norm, const double* sums, double mean_share, double share) const {
    // Where there is no mean inf is no part of it.
    const double offset = mean_share ? sums[0] * mean_share : 0;
    const double square = sums[1] * share - offset * offset;
    return {static_cast<A>(shift[norm] + offset), static_cast<A>(square < 0 ? 0 : square)};
  }
};

// (mean, var) of each channel; zero where it has no elements.
std::tuple<Tensor, Tensor> channel_moments(const Tensor& x_in) {
  const Tensor x = in_layout(x_in, kOfBatch);
  const Norms norms = norms_of(x, kOfBatch);
  Tensor mean = empty({norms.total()}, sums_type(x)), var = empty({norms.total()}, sums_type(x));
  with_arithmetic(x, [&]<class A>(A) {
    const Deviations<A> sum(x, norms, false);
    const double share = 1.0 / std::max<int64_t>(1, norms.count());
    A *means = mutable_data<A>(mean), *vars = mutable_data<A>(var);
    const auto finish = [&](int64_t norm, const double* sums) {
      std::tie(means[norm], vars[norm]) = sum.finish(norm, sums, share, share);
    };
    sum_norms<A, 2>(norms, sum, finish);
  });
  return {mean, var};
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
    NormCall<A, kValues> call(x, given ? running_mean : none, given ? running_var : none, weight,
                              bias, statistics, eps, {act, A(gain), A(alpha)});
    const Stream<A> in = stream_of<A>(x), out = stream_of<A>(y);
    const auto write = [&](const Tile& tile) {
      Buffer<A> values, z;
      in.load(tile, values);
      call.centre(tile, values, z);
      apply(call.act, z, tile.size<A>());
      out.store(tile, z);
    };
    if (given) return for_all_tiles<A>(norms, write);
    const Deviations<A> sum(x, norms, statistics == kOfPixel);
    A *means = mutable_data<A>(mean), *vars = mutable_data<A>(var);
    const auto finish = [&](int64_t norm, const double* sums) {
      const auto [m, v] = sum.finish(norm, sums, call.mean_share, call.share);
      vars[norm] = v;
      call.set_rstd(norm, 1 / std::sqrt(v + eps));
      if (statistics == kOfPixel) return;
      means[norm] = m;
      call.set(kMean, norm, m);
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
    NormCall<A, kAll> call(x, mean, var, weight, bias, statistics, eps, {act, A(gain), A(alpha)});
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

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace
}  // namespace aigc_fast

// The derivative of act(group_norm(x) * weight + bias), in units of work as forward has them.
#include "group_norm_act.h"

namespace aigc_fast {
namespace {

// With n = (x - mean) * rstd, z = n * weight + bias and g = dy * act'(z):
//   dbias = sum of g, dweight = sum of g * n, both over all but the channels
//   dx = rstd * (g * weight - mean of (g * weight) - n * mean of (g * weight * n)), over the group
template <class T, Smooth act>
struct Backward : GroupNormCall<T> {
  using A = Acc<T>;
  using GroupNormCall<T>::s;
  const T* dy;
  T* dx;
  std::vector<A> partial;        // [sum of g, of g * n] of pieces
  std::vector<double> sums;      // the same of each (sample, channel)
  std::vector<A> group_sums[2];  // the means over the group, with the weight

  struct Terms {
    Vec<A> normed, grad;
  };
  AIGC_INLINE static Terms terms(Vec<A> x, Vec<A> dy, Vec<A> mean, Vec<A> rstd, Vec<A> weight,
                                 Vec<A> bias) {
    const Vec<A> n = (x - mean) * rstd;
    return {n, dy * activate<act, A>(n * weight + bias).slope};
  }
  // Sums of one channel of a sample, from `pieces` pieces that lie `stride` apart in `partial`.
  void sum_channel(int64_t sample, int64_t c, int64_t at, int64_t pieces, int64_t stride,
                   int64_t second) {
    double total[2] = {};
    for (int64_t p = 0; p < pieces; ++p)
      for (int k = 0; k < 2; ++k) total[k] += partial[at + p * stride + k * second];
    for (int k = 0; k < 2; ++k) sums[2 * (sample * s.channels + c) + k] = total[k];
  }
  void conclude(int64_t u) {
    const int64_t width = s.width(), first = u % s.groups * width;
    const double* of = &sums[2 * u * width];
    double total[2] = {};
    for (int64_t c = 0; c < width; ++c)
      for (int k = 0; k < 2; ++k) total[k] += of[2 * c + k] * double(this->weight[first + c]);
    for (int k = 0; k < 2; ++k) group_sums[k][u] = A(total[k] / s.group_size());
  }
  void contiguous() {
    const int64_t n = (s.spatial + kGroupPiece - 1) / kGroupPiece, width = s.width();
    partial.resize(2 * s.batch * s.channels * n);
    // Row r is a channel of a sample.
    auto look = [&](int64_t r, int64_t piece) {
      const int64_t c = r % s.channels, u = r / width, begin = piece * kGroupPiece;
      const Vec<A> mean = broadcast(this->mean[u]), rstd = broadcast(this->rstd[u]);
      const Vec<A> weight = broadcast(this->weight[c]), bias = broadcast(this->bias[c]);
      const int64_t at = r * s.spatial + begin;
      const auto found = sum_row<T, 2, 2>(std::min(kGroupPiece, s.spatial - begin),
                                          {this->x + at, dy + at}, 0, [=](auto& v, Vec<A>* to) {
                                            const Terms t =
                                                terms(v[0], v[1], mean, rstd, weight, bias);
                                            to[0] += t.grad;
                                            to[1] += t.grad * t.normed;
                                          });
      for (int k = 0; k < 2; ++k) partial[2 * (r * n + piece) + k] = found[k];
    };
    auto total = [&](int64_t u) {
      for (int64_t r = u * width; r < (u + 1) * width; ++r)
        sum_channel(r / s.channels, r % s.channels, 2 * r * n, n, 2, 1);
      conclude(u);
    };
    auto write = [&](int64_t r, int64_t piece) {
      const int64_t c = r % s.channels, u = r / width, begin = piece * kGroupPiece;
      const Vec<A> mean = broadcast(this->mean[u]), rstd = broadcast(this->rstd[u]);
      const Vec<A> weight = broadcast(this->weight[c]), bias = broadcast(this->bias[c]);
      const A s1 = group_sums[0][u], s2 = group_sums[1][u];
      const int64_t at = r * s.spatial + begin;
      map_row<T, 2>(std::min(kGroupPiece, s.spatial - begin), {this->x + at, dy + at}, dx + at,
                    [=](auto& v) {
                      const Terms t = terms(v[0], v[1], mean, rstd, weight, bias);
                      return (t.grad * weight - s1 - t.normed * s2) * rstd;
                    });
    };
    if (s.cached(2 * sizeof(T))) {
      in_parallel(s.units(), s.group_size(), [&](int64_t u) {
        for (int64_t i = u * width * n; i < (u + 1) * width * n; ++i) look(i / n, i % n);
        total(u);
        for (int64_t i = u * width * n; i < (u + 1) * width * n; ++i) write(i / n, i % n);
      });
    } else {
      const int64_t all = s.batch * s.channels * n, size = std::min(kGroupPiece, s.spatial);
      in_parallel(all, size, [&](int64_t i) { look(i / n, i % n); });
      in_parallel(s.units(), width * n, total);
      in_parallel(all, size, [&](int64_t i) { write(i / n, i % n); });
    }
  }
  void channels_last() {
    const int64_t n = s.row_pieces(), channels = s.channels;
    partial.resize(2 * s.batch * n * channels);
    const std::vector<A> mean = this->of_channels(this->mean), rstd = this->of_channels(this->rstd);
    this->for_row_pieces([&](int64_t piece, int64_t b, int64_t row, int64_t rows) {
      const int64_t from = (b * s.spatial + row) * channels, first = b * channels;
      sum_columns<T, 2, 2, 4>(rows, channels, {this->x + from, dy + from},
                              {&mean[first], &rstd[first], this->weight.data(), this->bias.data()},
                              &partial[2 * piece * channels], [](auto& v, auto& p, Vec<A>* to) {
                                const Terms t = terms(v[0], v[1], p[0], p[1], p[2], p[3]);
                                to[0] += t.grad;
                                to[1] += t.grad * t.normed;
                              });
    });
    in_parallel(s.batch * channels, n, [&](int64_t i) {
      const int64_t b = i / channels, c = i % channels;
      sum_channel(b, c, 2 * b * n * channels + c, n, 2 * channels, channels);
    });
    for (int64_t u = 0; u < s.units(); ++u) conclude(u);
    const std::vector<A> s1 = this->of_channels(group_sums[0].data());
    const std::vector<A> s2 = this->of_channels(group_sums[1].data());
    this->for_row_pieces([&](int64_t, int64_t b, int64_t row, int64_t rows) {
      const int64_t at = (b * s.spatial + row) * channels, first = b * channels;
      map_columns<T, 2, 6>(rows, channels, {this->x + at, dy + at},
                           {&mean[first], &rstd[first], this->weight.data(), this->bias.data(),
                            &s1[first], &s2[first]},
                           dx + at, [](auto& v, auto& p) {
                             const Terms t = terms(v[0], v[1], p[0], p[1], p[2], p[3]);
                             return (t.grad * p[2] - p[4] - t.normed * p[5]) * p[1];
                           });
    });
  }
};

// (dx, dweight, dbias), the last two empty where there is no such parameter or it is not asked for.
std::tuple<Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& mean_in, const Tensor& rstd_in,
    const MaybeTensor& weight, const MaybeTensor& bias, int64_t groups, int64_t act) {
  const GroupShape s = group_shape_of(x_in, groups, weight, bias);
  const Tensor x = in_memory_order(x_in);
  check_like(dy_in, x, "grad_output");
  for (const Tensor* t : {&mean_in, &rstd_in})
    require(t->numel() == s.units() && t->scalar_type() == acc_dtype(x),
            "mean and rstd must be those of group_norm_act");
  Tensor dx = empty_in_order(x, s.channels_last);
  const Tensor dy = in_order_of(dy_in, dx), mean = as_contiguous(mean_in);
  const Tensor rstd = as_contiguous(rstd_in);
  Tensor dweight = empty({weight ? s.channels : 0}, x.scalar_type());
  Tensor dbias = empty({bias ? s.channels : 0}, x.scalar_type());
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    std::vector<double> sums(2 * s.batch * s.channels);
    if (x.numel() > 0)
      with_smooth(act, [&]<Smooth kind>(std::integral_constant<Smooth, kind>) {
        Backward<T, kind> backward{
            {s, data<T>(x), channel_values<A>(weight, s.channels, "weight", 1),
             channel_values<A>(bias, s.channels, "bias", 0), const_cast<A*>(data<A>(mean)),
             const_cast<A*>(data<A>(rstd))},
            data<T>(dy),
            mutable_data<T>(dx),
            {},
            std::move(sums),
            {std::vector<A>(s.units()), std::vector<A>(s.units())}};
        s.channels_last ? backward.channels_last() : backward.contiguous();
        sums = std::move(backward.sums);
      });
    for (int k = 0; k < 2; ++k) {
      const Tensor& out = k ? dweight : dbias;
      for (int64_t c = 0; c < out.numel(); ++c) {
        double total = 0;
        for (int64_t b = 0; b < s.batch; ++b) total += sums[2 * (b * s.channels + c) + k];
        store_one(mutable_data<T>(out) + c, A(total));
      }
    }
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward));
}

}  // namespace
}  // namespace aigc_fast

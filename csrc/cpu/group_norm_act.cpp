// y = act(group_norm(x) * weight + bias).
//
// A group that fits the L2 cache is one unit of work: it is read from memory once, and the second
// look at it costs no memory traffic, in which time the next group is asked for. Larger groups, and
// those of channels_last tensors, whose elements lie apart, take two passes over the pieces.
#include "group_norm_act.h"

namespace aigc_fast {
namespace {

template <class T, Smooth act>
struct Forward : GroupNormCall<T> {
  using A = Acc<T>;
  using GroupNormCall<T>::s;
  T* y;
  double eps;
  static constexpr Ties kTies = act == Smooth::none ? Ties::even : Ties::away;

  int64_t pieces() const { return (s.group_size() + kGroupPiece - 1) / kGroupPiece; }
  Moments look(int64_t u, int64_t piece) const {
    const int64_t begin = piece * kGroupPiece;
    return moments(this->x + u * s.group_size() + begin,
                   std::min(kGroupPiece, s.group_size() - begin));
  }
  void conclude(int64_t u, const Moments& m) const {
    this->mean[u] = A(m.mean);
    this->rstd[u] = A(1 / std::sqrt(m.squares / m.count + eps));
  }
  void write(int64_t u, int64_t begin, int64_t end, int64_t ahead) const {
    const A mean = this->mean[u], rstd = this->rstd[u];
    this->for_channels(u, begin, end, [&](int64_t c, int64_t at, int64_t count) {
      const A scale = rstd * this->weight[c], shift = this->bias[c];
      map_row<T, 1, 0, kTies>(
          count, {this->x + at}, y + at,
          [=](auto& v) { return smooth<act, A, T>((v[0] - mean) * scale + shift); }, {}, ahead);
    });
  }
  void contiguous() const {
    if (s.cached(sizeof(T))) {
      in_parallel(s.units(), s.group_size(), [&](int64_t u) {
        Moments total = look(u, 0);
        for (int64_t p = 1; p < pieces(); ++p) total.add(look(u, p));
        conclude(u, total);
        write(u, 0, s.group_size(), s.group_size());
      });
      return;
    }
    const int64_t n = pieces();
    std::vector<Moments> found(s.units() * n);
    in_parallel(s.units() * n, kGroupPiece, [&](int64_t i) { found[i] = look(i / n, i % n); });
    for (int64_t u = 0; u < s.units(); ++u) {
      Moments total = found[u * n];
      for (int64_t p = 1; p < n; ++p) total.add(found[u * n + p]);
      conclude(u, total);
    }
    in_parallel(s.units() * n, kGroupPiece, [&](int64_t i) {
      const int64_t begin = i % n * kGroupPiece;
      write(i / n, begin, std::min(begin + kGroupPiece, s.group_size()), kAhead<T>);
    });
  }
  void channels_last() const {
    const int64_t n = s.row_pieces(), channels = s.channels;
    std::vector<Moments> found(s.batch * n * s.groups);
    this->for_row_pieces([&](int64_t piece, int64_t b, int64_t row, int64_t rows) {
      moments(s, this->x + (b * s.spatial + row) * channels, rows, &found[piece * s.groups]);
    });
    for (int64_t u = 0; u < s.units(); ++u) {
      const Moments* of = &found[u / s.groups * n * s.groups + u % s.groups];
      Moments total = of[0];
      for (int64_t p = 1; p < n; ++p) total.add(of[p * s.groups]);
      conclude(u, total);
    }
    const std::vector<A> mean = this->of_channels(this->mean);
    std::vector<A> scale = this->of_channels(this->rstd);
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t c = 0; c < channels; ++c) scale[b * channels + c] *= this->weight[c];
    this->for_row_pieces([&](int64_t, int64_t b, int64_t row, int64_t rows) {
      const int64_t at = (b * s.spatial + row) * channels, first = b * channels;
      map_columns<T, 1, 3, kTies>(
          rows, channels, {this->x + at}, {&mean[first], &scale[first], this->bias.data()}, y + at,
          [](auto& v, auto& p) { return smooth<act, A, T>((v[0] - p[0]) * p[1] + p[2]); });
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x_in, const MaybeTensor& weight,
                                                  const MaybeTensor& bias, int64_t groups,
                                                  double eps, int64_t act) {
  const GroupShape s = group_shape_of(x_in, groups, weight, bias);
  const Tensor x = in_memory_order(x_in);
  Tensor y = empty_in_order(x, s.channels_last);
  Tensor mean = empty({s.batch, groups}, acc_dtype(x)), rstd = empty_like_dense(mean);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    if (x.numel() == 0) {
      for (Tensor* t : {&mean, &rstd}) std::fill_n(mutable_data<A>(*t), s.units(), A(0));
      return;
    }
    with_smooth(act, [&]<Smooth kind>(std::integral_constant<Smooth, kind>) {
      const Forward<T, kind> forward{
          {s, data<T>(x), channel_values<A>(weight, s.channels, "weight", 1),
           channel_values<A>(bias, s.channels, "bias", 0), mutable_data<A>(mean),
           mutable_data<A>(rstd)},
          mutable_data<T>(y),
          eps};
      s.channels_last ? forward.channels_last() : forward.contiguous();
    });
  });
  return {y, mean, rstd};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act));
}

}  // namespace
}  // namespace aigc_fast

// What the directions of norm_act have in common.
//
// Differences are taken before products, as in g - mean(g): where they cancel, what is left is as
// exact as the terms, and not as the terms times the scale.
#pragma once

#include "act_dispatch.h"
#include "channels.h"
#include "map_tile.h"
#include "memory_order.h"

namespace aigc_fast {

// The numbers are part of the schema: whose mean and variance.
enum Statistics : int64_t { kGiven, kOfBatch, kOfSample, kOfPixel };

inline Tensor in_layout(const Tensor& x, int64_t statistics) {
  require(statistics >= kGiven && statistics <= kOfPixel, "statistics must be in [0, 3]");
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  if (statistics <= kOfBatch) return as_dense(x);
  return in_memory_order(x);
}

inline Norms norms_of(const Tensor& x, int64_t statistics) {
  if (statistics <= kOfBatch) return norms_of_channels(x);
  const int64_t channels = x.size(1), batch = x.size(0), positions = positions_of(x);
  const bool innermost = positions == 1 || is_channels_last(x);
  if (statistics == kOfSample)
    return innermost ? Norms{batch, positions, channels, 1}
                     : Norms{1, 1, batch * channels, positions};
  return innermost ? Norms{1, 1, batch * positions, channels}
                   : Norms{batch, channels, positions, 1};
}

// What every element needs of its norm. Further values of a direction follow.
enum NormValue { kMean, kRstd, kScale, kBias, kValues };

template <class A, int V>
struct NormCall {
  Norms norms;
  Values<A, V> values;
  std::vector<double> weight, rstd;
  // Of the elements that a norm's statistics were made of, 1 / their number; 0 where they are
  // given, and for the mean of pixels, which have none.
  double share, mean_share;

  NormCall(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var,
           const MaybeTensor& weight_in, const MaybeTensor& bias, int64_t statistics, double eps)
      : norms(norms_of(x, statistics)),
        values(norms.total()),
        weight(norms.total()),
        rstd(norms.total()),
        share(statistics == kGiven || norms.count() == 0 ? 0.0 : 1.0 / norms.count()),
        mean_share(statistics == kOfPixel ? 0.0 : share) {
    const int64_t n = norms.total();
    channel_values<A>(mean, n, "mean", 0, values.row(kMean));
    channel_values<double>(weight_in, n, "weight", 1, weight.data());
    channel_values<double>(var, n, "var", 1, rstd.data());
    channel_values<A>(bias, n, "bias", 0, values.row(kBias));
    torch::stable::parallel_for(0, n, grain_of(8), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        set(kMean, i, values.row(kMean)[i]);
        set(kBias, i, values.row(kBias)[i]);
        set_rstd(i, 1 / std::sqrt(rstd[i] + eps));
      }
    });
  }
  void set_rstd(int64_t norm, double value) {
    rstd[norm] = value;
    set(kRstd, norm, value);
    set(kScale, norm, value * weight[norm]);
  }
  // A NaN becomes the plain one: what others hold in their low bits could round to infinity.
  void set(int value, int64_t norm, double to) {
    values.row(value)[norm] = std::isnan(to) ? std::numeric_limits<A>::quiet_NaN() : A(to);
  }
};

// x - mean, and normalised x * weight + bias.
template <class A>
struct Centred {
  Vec<A> x, z;

  template <class P>
  AIGC_INLINE Centred(Vec<A> value, const P& at)
      : x(value - at[kMean]), z(x * at[kScale] + at[kBias]) {}
};

}  // namespace aigc_fast

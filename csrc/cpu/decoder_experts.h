// The experts that the tokens of a layer are sent to.
#pragma once

#include "decoder_layers.h"

namespace aigc_fast {

class ChosenExperts {
 public:
  explicit ChosenExperts(const DecoderSizes& s)
      : s_(s),
        scores_(s.batch * s.experts),
        factors_(s.batch * s.per_token),
        chosen_(factors_.size()) {}

  // Of row `i` of the activations between gate, up and down: b * per_token + j.
  int64_t expert(int64_t i) const { return chosen_[i]; }
  float factor(int64_t i) const { return factors_[i]; }

  // router . x for a part of the experts.
  void score(int64_t b, int64_t part, int64_t parts, const Tensor& router, const float* x) {
    dispatch(router, "routers", [&]<class S>(S) {
      if constexpr (!std::is_same_v<S, double>)
        for (int64_t e = part * s_.experts / parts; e < (part + 1) * s_.experts / parts; ++e) {
          const S* weight = data<S>(router) + e * s_.hidden;
          scores_[b * s_.experts + e] =
              sums_over<float, 1>(s_.hidden, [&](int64_t i, auto n, Vec<float>* sum) {
                sum[0] += load(weight + i, n) * load(x + i, n);
              })[0];
        }
    });
  }

  // Those with the largest scores, ties by the lower number, and their factors: the softmax over
  // all scores, or over those alone.
  void choose(int64_t b, bool normalize) {
    const float* scores = scores_.data() + b * s_.experts;
    int32_t* chosen = chosen_.data() + b * s_.per_token;
    float* factors = factors_.data() + b * s_.per_token;
    std::vector<bool> taken(s_.experts);
    for (int64_t j = 0; j < s_.per_token; ++j) {
      int64_t best = -1;
      for (int64_t e = 0; e < s_.experts; ++e)
        // A NaN is never above another, so that the first that is left stands for it.
        if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
      taken[best] = true;
      chosen[j] = static_cast<int32_t>(best);
      factors[j] = std::exp(scores[best] - scores[chosen[0]]);
    }
    float total = 0;
    for (int64_t e = 0; e < s_.experts; ++e)  // NaN of one is NaN of all, as by torch's softmax
      if (!normalize || taken[e] || std::isnan(scores[e]))
        total += std::exp(scores[e] - scores[chosen[0]]);
    for (int64_t j = 0; j < s_.per_token; ++j) factors[j] /= total;
  }

 private:
  const DecoderSizes& s_;
  std::vector<float> scores_, factors_;
  std::vector<int32_t> chosen_;
};

}  // namespace aigc_fast

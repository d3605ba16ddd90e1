// The experts that a token is sent to.
#pragma once

#include "sums.h"

namespace aigc_fast {

// weight . x
template <class S>
float router_score(const S* weight, const float* x, int64_t width) {
  return sums_over<float, 1>(width, [&](int64_t i, auto n, Vec<float>* sum) {
    sum[0] += load(weight + i, n) * load(x + i, n);
  })[0];
}

// The `count` largest of the scores, ties by the lower number, and their factors: the softmax over
// all scores, or over those alone.
inline void choose_experts(const float* scores, int64_t experts, int64_t count, bool normalize,
                           int32_t* chosen, float* factors) {
  std::vector<bool> taken(experts);
  for (int64_t j = 0; j < count; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e)
      // A NaN is never above another, so that the first that is left stands for it.
      if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
    taken[best] = true;
    chosen[j] = static_cast<int32_t>(best);
    factors[j] = std::exp(scores[best] - scores[chosen[0]]);
  }
  float total = 0;
  for (int64_t e = 0; e < experts; ++e)
    if (!normalize || taken[e]) total += std::exp(scores[e] - scores[chosen[0]]);
  for (int64_t j = 0; j < count; ++j) factors[j] /= total;
}

}  // namespace aigc_fast

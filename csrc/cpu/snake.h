// What snake and its anti-aliased form share.
#pragma once

#include "channels.h"

#include <aigc_fast/snake.h>

namespace aigc_fast {

// 1 / (beta + eps) of each channel; fp32 would round a gradient that has its square twice.
inline std::vector<double> inverse_of(const Tensor& beta, int64_t channels) {
  std::vector<double> inverse = channel_values<double>(beta, channels, "beta", 0);
  for (double& b : inverse) b = 1 / (b + kSnakeEps);
  return inverse;
}

}  // namespace aigc_fast

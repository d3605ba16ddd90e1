// The activation's number in a schema, as a compile-time constant.
#pragma once

#include "tensor.h"

#include <aigc_fast/activation.h>

namespace aigc_fast {

// Calls body(act) with the activation as a compile-time constant.
template <class F>
void with_act(int64_t act, F&& body) {
  require(act >= 0 && act < kNumActs, "act must be in [0, ", kNumActs, "), got ", act);
  [&]<int64_t... ids>(std::integer_sequence<int64_t, ids...>) {
    ((act == ids ? body(std::integral_constant<Act, Act(ids)>{}) : void()), ...);
  }(std::make_integer_sequence<int64_t, kNumActs>{});
}

}  // namespace aigc_fast

// The activation's number in a schema, as a compile-time constant.
#pragma once

#include "enum_dispatch.h"

#include <aigc_fast/activation.h>

namespace aigc_fast {

template <class F>
void with_act(int64_t act, F&& body) {
  with_enum<Act, kNumActs>(act, "act", body);
}

}  // namespace aigc_fast

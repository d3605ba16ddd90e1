// A number in a schema as a constant of an enum, known to the compiler.
#pragma once

#include "tensor.h"

namespace aigc_fast {

// Calls body(std::integral_constant<E, value>{}) for one of the first `count` values of E.
template <class E, int64_t count, class F>
void with_enum(int64_t value, const char* name, F&& body) {
  require(value >= 0 && value < count, name, " must be in [0, ", count, "), got ", value);
  [&]<int64_t... values>(std::integer_sequence<int64_t, values...>) {
    ((value == values ? body(std::integral_constant<E, E(values)>{}) : void()), ...);
  }(std::make_integer_sequence<int64_t, count>{});
}

}  // namespace aigc_fast

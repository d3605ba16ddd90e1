// The kind of products that suits a convolution's type and outputs, and the processor.
//
// All kinds read a scratch [pixel][channel]: the input, converted, with zeros around it. A tap of
// the filter is then an address, that of its input for the first of `width` neighbouring outputs.
#pragma once

#include "conv_tiles.h"
#include "conv_vectors.h"

namespace aigc_fast {

// Calls f with a value of type std::type_identity<Products>.
template <class T, class F>
void with_products(int64_t outputs, F&& f) {
#if AIGC_AMX
  if constexpr (std::is_same_v<T, bf16>)
    if (has_amx_bf16()) return f(std::type_identity<TileProducts>{});
#endif
  if (outputs <= DotProducts<T>::kMaxOutputs) return f(std::type_identity<DotProducts<T>>{});
#if AIGC_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>)
    if (has_bf16_dot()) return f(std::type_identity<VectorProducts<T, Bf16Dot>>{});
#endif
  f(std::type_identity<VectorProducts<T, MultiplyAdd<T>>>{});
}

}  // namespace aigc_fast

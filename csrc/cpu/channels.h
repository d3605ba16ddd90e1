// Values of channels: parameters as numbers, and numbers as the gradient of a parameter.
#pragma once

#include "tensor.h"

namespace aigc_fast {

// The parameter's values, or `missing` for each channel, in to[0, channels).
template <class A>
void channel_values(const std::optional<Tensor>& parameter, int64_t channels, const char* name,
                    A missing, A* to) {
  if (!parameter) return std::fill(to, to + channels, missing), void();
  require(parameter->dim() == 1 && parameter->size(0) == channels, name, " must have shape (",
          channels, ",)");
  const Tensor dense = as_contiguous(*parameter);
  dispatch(dense, name, [&]<class T>(T) {
    const T* from = data<T>(dense);
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (std::is_same_v<T, double>) {
        to[c] = static_cast<A>(from[c]);
      } else {
        to[c] = load_n(from + c, 1)[0];
      }
    }
  });
}

// `values` as a tensor in the dtype of `parameter`; empty where there is none.
inline Tensor like_parameter(const std::vector<double>& values,
                             const std::optional<Tensor>& parameter, ScalarType missing) {
  if (!parameter) return empty({0}, missing);
  Tensor out = empty({static_cast<int64_t>(values.size())}, parameter->scalar_type());
  dispatch(out, "parameter", [&]<class T>(T) {
    T* to = mutable_data<T>(out);
    for (size_t c = 0; c < values.size(); ++c)
      store_n(to + c, broadcast(static_cast<Acc<T>>(values[c])), 1);
  });
  return out;
}

}  // namespace aigc_fast

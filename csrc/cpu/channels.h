// Values of channels: parameters as numbers, and numbers as the gradient of a parameter.
#pragma once

#include "tensor.h"

namespace aigc_fast {

// The parameter's values, or `missing` for each channel, in to[0, channels).
template <class A>
void channel_values(const MaybeTensor& parameter, int64_t channels, const char* name, A missing,
                    A* to) {
  if (!parameter) return std::fill(to, to + channels, missing), void();
  require(parameter->dim() == 1 && parameter->size(0) == channels, name, " must have shape (",
          channels, ",)");
  const Tensor dense = as_contiguous(*parameter);
  dispatch(dense, name, [&]<class T>(T) {
    const T* from = data<T>(dense);
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<A>(load_one(from + c));
  });
}

// The same as a vector.
template <class A>
std::vector<A> channel_values(const MaybeTensor& parameter, int64_t channels, const char* name,
                              A missing) {
  std::vector<A> values(channels);
  channel_values(parameter, channels, name, missing, values.data());
  return values;
}

// `values` as a tensor like `parameter`; empty where there is none.
inline Tensor like_parameter(const std::vector<double>& values, const MaybeTensor& parameter,
                             ScalarType missing) {
  if (!parameter) return empty({0}, missing);
  Tensor out = empty_contiguous_like(*parameter);
  dispatch(out, "parameter", [&]<class T>(T) {
    T* to = mutable_data<T>(out);
    for (size_t c = 0; c < values.size(); ++c) store_one(to + c, static_cast<Acc<T>>(values[c]));
  });
  return out;
}

}  // namespace aigc_fast

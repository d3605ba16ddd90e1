// What every CPU kernel needs of a torch tensor.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include <aigc_fast/torch.h>
#include <aigc_fast/vec_math.h>

namespace aigc_fast {

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}
inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name,
                       const char* name_of_like = "x") {
  require(same_shape(x, like) && x.scalar_type() == like.scalar_type(), name,
          " must have the shape and dtype of ", name_of_like);
}

// A new CPU tensor; the C shim costs half of what the dispatcher takes for torch.empty.
template <class Sizes, class Strides>
Tensor empty_strided(const Sizes& sizes, const Strides& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const int32_t code = static_cast<int32_t>(dtype);  // the shim's codes are the enum's values
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1))
    strides[i] = stride;
  return empty_strided(sizes, strides, dtype);
}
inline Tensor empty_contiguous_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty({sizes.begin(), sizes.end()}, x.scalar_type());
}
// Same sizes and strides: only for a dense tensor, one that fills its memory without gaps.
inline Tensor empty_like_dense(const Tensor& x) {
  return empty_strided(x.sizes(), x.strides(), x.scalar_type());
}

// True if the tensor's elements fill numel() slots of memory, in whatever order of dimensions:
// contiguous, channels_last and every other permutation.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<int> order;
  for (int d = 0; d < static_cast<int>(sizes.size()); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}
inline Tensor as_dense(const Tensor& x) { return is_dense(x) ? x : torch::stable::contiguous(x); }
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
// x in the memory order of `like`, which is dense and has the same shape.
inline Tensor in_order_of(const Tensor& x, const Tensor& like) {
  if (same_strides(x, like) || (x.is_contiguous() && like.is_contiguous())) return x;
  Tensor copy = empty_strided(like.sizes(), like.strides(), x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f with a value of the tensor's C++ type: dispatch(x, "x", [&]<class T>(T) { ... }).
template <class F>
void dispatch(const Tensor& x, const char* name, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    case ScalarType::Double:
      return f(double{});
    default:
      require(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

// The dtype of Acc<T> where the elements of x are T.
inline ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The number `offset` elements behind the first of a tensor of any floating dtype.
inline double number_at(const Tensor& x, int64_t offset, const char* name) {
  double value = 0;
  dispatch(x, name, [&]<class T>(T) { value = load_one(data<T>(x) + offset); });
  return value;
}

inline void set_number(const Tensor& x, int64_t offset, double value) {
  dispatch(x, "x",
           [&]<class T>(T) { store_one(mutable_data<T>(x) + offset, static_cast<Acc<T>>(value)); });
}

// Elements a thread should get at least: below this a second thread costs more than it saves
// (waking it takes about 4 us).
constexpr int64_t kGrain = 16384;

// Items a thread should get at least, of so many elements each.
inline int64_t grain_of(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}
// f(i) for every i below count; each takes about so many elements.
template <class F>
void in_parallel(int64_t count, int64_t elements, F&& f) {
  torch::stable::parallel_for(0, count, grain_of(elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace aigc_fast

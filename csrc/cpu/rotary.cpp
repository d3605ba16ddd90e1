// The operator apply_rotary (rotary.h turns the pairs).
#include "rotary.h"

namespace aigc_fast {
namespace {

template <class T, class C>
void rotate(const Tensor& x, Tensor& y, Rotation<Acc<T>, C> rotation) {
  const int64_t seq = x.size(1), heads = x.size(2), head_dim = x.size(3);
  const int64_t rotated = rotation.width(), token_size = heads * head_dim;
  const int64_t x_batch = x.stride(0), x_token = x.stride(1), x_head = x.stride(2);
  const T* in = data<T>(x);
  T* out = mutable_data<T>(y);
  torch::stable::parallel_for(
      0, x.size(0) * seq, grain_of(token_size), [&](int64_t begin, int64_t end) {
        Rotation<Acc<T>, C> turns = rotation;
        for (int64_t token = begin; token < end; ++token) {
          const int64_t b = token / seq, t = token % seq;
          const T* from = in + b * x_batch + t * x_token;
          T* to = out + token * token_size;
          turns.at(b, t, [&, from, to](const auto& turn) mutable {
            for (int64_t h = 0; h < heads; ++h, from += x_head, to += head_dim) {
              ask_for<1>(to + kAhead<T>, head_dim);
              turn(from, to);
              if (rotated < head_dim)
                std::memcpy(static_cast<void*>(to + rotated), from + rotated,
                            (head_dim - rotated) * sizeof(T));
            }
          });
        }
      });
}

Tensor apply_rotary(const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in,
                    bool interleaved, bool inverse) {
  require(x_in.dim() == 4, "x must have 4 dimensions");
  check_angles(x_in, cos_in, sin_in);
  const ScalarType dtype = x_in.scalar_type();
  const Tensor x = with_dense_rows(x_in);
  const Tensor cos = with_dense_rows(cos_in), sin = with_dense_rows(sin_in);
  Tensor y = empty_contiguous_like(x);
  dispatch(x, "x", [&]<class T>(T) {
    if (cos.scalar_type() == dtype) {
      rotate<T, T>(x, y, {cos, sin, interleaved, inverse});
    } else if constexpr (!std::is_same_v<T, double>) {
      rotate<T, float>(x, y, {cos, sin, interleaved, inverse});
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("apply_rotary", TORCH_BOX(&apply_rotary)); }

}  // namespace
}  // namespace aigc_fast

// Rotary position embedding: each pair of features turned by the angle of its position.
//
// The pair is (i, i + r / 2) or, interleaved, (2i, 2i + 1). All heads of a token share its angles.
#include "tensor.h"

namespace aigc_fast {
namespace {

// (first, second) -> (first c - second s, second c + first s) with the halves of a head as the
// two; `sign` is -1 to turn back.
template <class T, class C>
void rotate_halves(const T* x, T* y, const C* cos, const C* sin, Acc<T> sign, int64_t half) {
  for_vectors<Acc<T>>(half, [&](int64_t i, auto lanes) {
    const Vec<Acc<T>> c = load(cos + i, lanes), s = load(sin + i, lanes) * sign;
    const Vec<Acc<T>> first = load(x + i, lanes), second = load(x + half + i, lanes);
    store(y + i, first * c - second * s, lanes);
    store(y + half + i, second * c + first * s, lanes);
  });
}

template <class A, class F>
constexpr Vec<Bits<A>> lane_numbers(F f) {
  Vec<Bits<A>> numbers = {};
  for (int i = 0; i < kLanes<A>; ++i) numbers[i] = f(i);
  return numbers;
}

// table[2i] = sign_even * p[i] * sign, table[2i + 1] = p[i] * sign; writes whole vectors.
template <class A, class C>
void spread_pairs(const C* p, A* table, A sign_even, A sign, int64_t half) {
  constexpr int lanes = kLanes<A>;
  const Vec<Bits<A>> low = lane_numbers<A>([](int i) { return i / 2; });
  const Vec<Bits<A>> high = low + lanes / 2;
  Vec<A> signs = broadcast(sign);
  for (int i = 0; i < lanes; i += 2) signs[i] *= sign_even;
  for_vectors<A>(half, [&](int64_t i, auto n) {
    const Vec<A> v = load(p + i, n);
    store(table + 2 * i, __builtin_shuffle(v, low) * signs);
    store(table + 2 * i + lanes, __builtin_shuffle(v, high) * signs);
  });
}

// With neighbours as the pair: y[i] = x[i] * cos[i] + x[i ^ 1] * sin[i], sin negative at even i.
template <class T>
void rotate_neighbours(const T* x, T* y, const Acc<T>* cos, const Acc<T>* sin, int64_t rotated) {
  using A = Acc<T>;
  const Vec<Bits<A>> swapped = lane_numbers<A>([](int i) { return i ^ 1; });
  for_vectors<A>(rotated, [&](int64_t i, auto lanes) {
    const Vec<A> v = load(x + i, lanes);
    const Vec<A> partner = __builtin_shuffle(v, swapped);
    store(y + i, v * load(cos + i, lanes) + partner * load(sin + i, lanes), lanes);
  });
}

struct Strides {
  int64_t batch, token;
};

template <class T, class C>
void rotate(const Tensor& x, Tensor& y, const Tensor& cos, const Tensor& sin, bool interleaved,
            bool inverse) {
  using A = Acc<T>;
  const int64_t seq = x.size(1), heads = x.size(2), head_dim = x.size(3);
  const int64_t half = cos.size(cos.dim() - 1), rotated = 2 * half;
  const auto strides_of = [](const Tensor& table) -> Strides {
    return {table.dim() == 3 ? table.stride(0) : 0, table.stride(table.dim() - 2)};
  };
  const Strides cos_at = strides_of(cos), sin_at = strides_of(sin), x_at{x.stride(0), x.stride(1)};
  const int64_t head_stride = x.stride(2);
  const T* in = data<T>(x);
  const C *cos_data = data<C>(cos), *sin_data = data<C>(sin);
  T* out = mutable_data<T>(y);
  const A sign = inverse ? -1 : 1;
  const int64_t token_size = heads * head_dim;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, token_size));
  torch::stable::parallel_for(0, x.size(0) * seq, grain, [&](int64_t begin, int64_t end) {
    const int64_t padded = (half + kLanes<A> - 1) / kLanes<A> * kLanes<A> * 2;
    std::vector<A> table(interleaved ? 2 * padded : 0);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / seq, t = token % seq;
      const C* c = cos_data + b * cos_at.batch + t * cos_at.token;
      const C* s = sin_data + b * sin_at.batch + t * sin_at.token;
      const T* from = in + b * x_at.batch + t * x_at.token;
      T* to = out + token * token_size;
      if (interleaved) {
        spread_pairs<A>(c, table.data(), A(1), A(1), half);
        spread_pairs<A>(s, table.data() + padded, A(-1), sign, half);
      }
      for (int64_t h = 0; h < heads; ++h, from += head_stride, to += head_dim) {
        if (interleaved) {
          rotate_neighbours(from, to, table.data(), table.data() + padded, rotated);
        } else {
          rotate_halves(from, to, c, s, sign, half);
        }
        if (rotated < head_dim)
          std::memcpy(static_cast<void*>(to + rotated), from + rotated,
                      (head_dim - rotated) * sizeof(T));
      }
    }
  });
}

Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

Tensor apply_rotary(const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in,
                    bool interleaved, bool inverse) {
  require(x_in.dim() == 4, "x must have 4 dimensions");
  require(cos_in.dim() == 2 || cos_in.dim() == 3, "cos must have 2 or 3 dimensions");
  require(same_shape(cos_in, sin_in), "sin must have the shape of cos");
  const int64_t tables = cos_in.dim();
  require(tables == 2 || cos_in.size(0) == x_in.size(0), "cos must have the batch size of x");
  require(cos_in.size(tables - 2) == x_in.size(1), "cos must have the sequence length of x");
  require(2 * cos_in.size(tables - 1) <= x_in.size(3), "cos must be at most half of head_dim wide");
  const ScalarType dtype = x_in.scalar_type(), angles = cos_in.scalar_type();
  require(angles == dtype || (angles == ScalarType::Float && dtype != ScalarType::Double),
          "cos must be float32 or have the dtype of x");
  require(sin_in.scalar_type() == angles, "sin must have the dtype of cos");
  const Tensor x = with_dense_rows(x_in);
  const Tensor cos = with_dense_rows(cos_in), sin = with_dense_rows(sin_in);
  const auto sizes = x.sizes();
  Tensor y = empty({sizes.begin(), sizes.end()}, dtype);
  dispatch(x, "x", [&]<class T>(T) {
    if (angles == dtype) {
      rotate<T, T>(x, y, cos, sin, interleaved, inverse);
    } else if constexpr (!std::is_same_v<T, double>) {
      rotate<T, float>(x, y, cos, sin, interleaved, inverse);
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("apply_rotary", TORCH_BOX(&apply_rotary)); }

}  // namespace
}  // namespace aigc_fast

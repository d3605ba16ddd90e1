// Vectors in pairs, sums over the lanes of many vectors at once, and exp of what is not positive:
// the arithmetic under two_vectors.h and attention.h.
#pragma once

#include <algorithm>
#include <utility>

#include <aigc_fast/vec_math.h>

namespace aigc_fast {

// 2 * lanes elements from p, in the order that takes the fewest instructions; store_pair restores
// the order. For bf16: even, then odd elements.
template <class T, class V = Vec<Acc<T>>>
AIGC_INLINE void load_pair(const T* p, V& a, V& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
    U32 raw;
    std::memcpy(&raw, p, sizeof raw);
    a = reinterpret_cast<V>(raw << 16);
    b = reinterpret_cast<V>(raw & 0xffff0000u);
  } else {
    a = load(p);
    b = load(p + kLanes<Acc<T>>);
  }
}

template <class V, int... i>
AIGC_INLINE void pair_to_halves(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V first = __builtin_shufflevector(a, b, (i / 2 + i % 2 * n)...);
  b = __builtin_shufflevector(a, b, (n / 2 + i / 2 + i % 2 * n)...);
  a = first;
}
template <class V, int... i>
AIGC_INLINE void halves_to_pair(V& a, V& b, std::integer_sequence<int, i...>) {
  const V even = __builtin_shufflevector(a, b, (2 * i)...);
  b = __builtin_shufflevector(a, b, (2 * i + 1)...);
  a = even;
}

// From the order of load_pair<T> to the first half, then the second, and back.
template <class T, class V>
AIGC_INLINE void pair_to_halves(V& a, V& b) {
  if constexpr (std::is_same_v<T, bf16>)
    pair_to_halves(a, b, std::make_integer_sequence<int, kLanes<Acc<T>>>{});
}
template <class T, class V>
AIGC_INLINE void halves_to_pair(V& a, V& b) {
  if constexpr (std::is_same_v<T, bf16>)
    halves_to_pair(a, b, std::make_integer_sequence<int, kLanes<Acc<T>>>{});
}

// Only the first n elements; the others are zero. Never touches memory past p + n.
template <class T, class V = Vec<Acc<T>>>
AIGC_INLINE void load_pair(const T* p, int64_t n, V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if (n == 2 * lanes) return load_pair(p, a, b);
  T buffer[std::max<int>(2 * lanes, kVectorBytes / sizeof(T))] = {};
#if defined(__AVX512BW__)
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0, size = n * sizeof(T); i < size; i += 64) {
    const __m512i part = _mm512_maskz_loadu_epi8(first_bytes(size - i), bytes + i);
    std::memcpy(reinterpret_cast<char*>(buffer) + i, &part, sizeof part);
  }
#else
  std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
#endif
  load_pair(static_cast<const T*>(buffer), a, b);
}

template <class T, class V = Vec<Acc<T>>>
AIGC_INLINE void store_pair(T* p, V a, V b, int64_t n) {
  constexpr int lanes = kLanes<Acc<T>>;
  T buffer[std::max<int>(2 * lanes, kVectorBytes / sizeof(T))];
  pair_to_halves<T>(a, b);
  store(buffer, a);
  store(buffer + lanes, b);
#if defined(__AVX512BW__)
  char* bytes = reinterpret_cast<char*>(p);
  for (int64_t i = 0, size = n * sizeof(T); i < size; i += 64) {
    __m512i part;
    std::memcpy(&part, reinterpret_cast<const char*>(buffer) + i, sizeof part);
    _mm512_mask_storeu_epi8(bytes + i, first_bytes(size - i), part);
  }
#else
  std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
#endif
}

// ---- lanes ------------------------------------------------------------------------------------

template <int step, class V, int... i>
AIGC_INLINE V add_halves(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (i & step ? n + i : i)...) +
         __builtin_shufflevector(a, b, (i & step ? n + (i ^ step) : i ^ step)...);
}

// Lane i of the result is the sum of the lanes of v[i]; with R rows, lane i * R + r is that of the
// lanes r, r + R, r + 2 * R ... of v[i].
template <class A, int R = 1, int step = kLanes<A> / 2>
AIGC_INLINE Vec<A> sum_each(Vec<A>* v) {
  if constexpr (step < R) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < step / R; ++i)
      v[i] = add_halves<step>(v[i], v[i + step / R], std::make_integer_sequence<int, kLanes<A>>{});
    return sum_each<A, R, step / 2>(v);
  }
}

template <int step, class V, int... i>
AIGC_INLINE void exchange(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V low = __builtin_shufflevector(a, b, (i & step ? n + (i ^ step) : i)...);
  b = __builtin_shufflevector(a, b, (i & step ? n + i : i ^ step)...);
  a = low;
}

// The lanes of a with `step` in their number against those of b without it.
template <int step, class V>
AIGC_INLINE void exchange(V& a, V& b) {
  exchange<step>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// Lane j of v[i] against lane i of v[j], for as many vectors as lanes.
template <class V, int step = sizeof(V) / sizeof(V{}[0]) / 2>
AIGC_INLINE void transpose(V* v) {
  if constexpr (step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < int(sizeof(V) / sizeof(V{}[0])); ++i)
      if (!(i & step)) exchange<step>(v[i], v[i + step]);
    transpose<V, step / 2>(v);
  }
}

// Combines the lanes that hold the same row: lane % R.
template <class A, int R, int step = kLanes<A> / 2, class F>
AIGC_INLINE Vec<A> over_keys(Vec<A> v, F f) {
  if constexpr (step < R) {
    return v;
  } else {
    v = f(v, swap_lanes<A, step>(v));
    return over_keys<A, R, step / 2>(v, f);
  }
}

// e^x for x <= 0; 0 below -87, where the true value is no normal number any more.
template <class A>
AIGC_INLINE Vec<A> exp_of_negative(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return exp<double>(x);
  } else {
    typedef Vec<uint32_t> I;  // it wraps around where x is far below
    const Vec<float> shifted = x * 1.44269504089f + 12582912.0f;
    const Vec<float> n = shifted - 12582912.0f;
    Vec<float> r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    const Vec<float> y = exp_tail(r) + r + 1.0f;
    const I power = (reinterpret_cast<I>(shifted) << 23) + 0x3f800000;  // 2^n
    return x < -87.0f ? Vec<float>{} : y * reinterpret_cast<Vec<float>>(power);
  }
}

}  // namespace aigc_fast

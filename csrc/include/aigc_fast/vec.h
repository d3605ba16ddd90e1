// A vector of the widest registers this build may use, to and from memory and across lanes.
//
// GCC's vector extension gives arithmetic, comparison and selection (mask ? a : b) for free and
// in one spelling for SSE2, AVX2, AVX-512 and other processors. Arithmetic is fp32 for fp32, bf16
// and fp16 tensors and fp64 for fp64 tensors: `Vec<Acc<T>>`.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define AIGC_INLINE inline __attribute__((always_inline))

namespace aigc_fast {

// Storage only: arithmetic happens in fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The type a kernel computes in when its tensors hold T.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
using Vec [[gnu::vector_size(kVectorBytes)]] = A;
template <class A>
using Bits = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
AIGC_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // keeps the sign of zero, which + would lose
}

// ---- load and store: any tensor type to and from fp32 (fp64) lanes -------------------------

template <class T>
AIGC_INLINE Vec<Acc<T>> load(const T* p) {
  using V = Vec<Acc<T>>;
  if constexpr (std::is_same_v<T, Acc<T>>) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, bf16>) {
    // GCC 12 makes six instructions of __builtin_convertvector here.
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (V)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return (V)_mm256_slli_epi32(wide, 16);
#else
    typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
    U16 raw;
    std::memcpy(&raw, p, sizeof raw);
    U32 wide = __builtin_convertvector(raw, U32) << 16;
    return reinterpret_cast<V>(wide);
#endif
  } else {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i].value);
    return v;
#endif
  }
}

template <class T>
AIGC_INLINE void store(T* p, Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    std::memcpy(p, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, bf16>) {
    typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
    U32 raw = reinterpret_cast<U32>(v);
    // Round to nearest even; a NaN keeps its sign and gets a quiet, non-zero mantissa.
    U32 rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
    U32 quiet = (raw >> 16) | 0x40u;
    U16 out = __builtin_convertvector(v == v ? rounded : quiet, U16);
    std::memcpy(p, &out, sizeof out);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i].value = static_cast<_Float16>(v[i]);
#endif
  }
}

#if defined(__AVX512BW__)
// The first n bytes of a vector, or all: a third of the time of a memcpy of unknown length.
AIGC_INLINE __mmask64 first_bytes(int64_t n) {
  return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1;
}
#endif

// The first n lanes; the others are zero. Never touches memory past p + n.
template <class T>
AIGC_INLINE Vec<Acc<T>> load_n(const T* p, int64_t n) {
#if defined(__AVX512BW__)
  const __m512i part = _mm512_maskz_loadu_epi8(first_bytes(n * sizeof(T)), p);
  T buffer[64 / sizeof(T)];
  std::memcpy(static_cast<void*>(buffer), &part, sizeof part);
#else
  T buffer[kLanes<Acc<T>>] = {};
  std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
#endif
  return load(static_cast<const T*>(buffer));
}

template <class T>
AIGC_INLINE void store_n(T* p, Vec<Acc<T>> v, int64_t n) {
#if defined(__AVX512BW__)
  T buffer[64 / sizeof(T)];
  store(buffer, v);
  __m512i part;
  std::memcpy(&part, buffer, sizeof part);
  _mm512_mask_storeu_epi8(p, first_bytes(n * sizeof(T)), part);
#else
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
#endif
}

// One element.
template <class T>
AIGC_INLINE Acc<T> load_one(const T* p) {
  return load_n(p, 1)[0];
}
template <class T>
AIGC_INLINE void store_one(T* p, Acc<T> value) {
  store_n(p, broadcast(value), 1);
}

// f(i, n) for each vector of [0, size): n is the number of lanes, all of them but for the last.
// In whole vectors n is a compile-time constant, so that only the tail pays for masking.
template <class A, class F>
AIGC_INLINE void for_vectors(int64_t size, F&& f) {
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) f(i, std::integral_constant<int, lanes>{});
  if (i < size) f(i, static_cast<int>(size - i));
}

template <class T, class N>
AIGC_INLINE Vec<Acc<T>> load(const T* p, N n) {
  if constexpr (std::is_same_v<N, int>) {
    return load_n(p, n);
  } else {
    return load(p);
  }
}
template <class T, class N>
AIGC_INLINE void store(T* p, Vec<Acc<T>> v, N n) {
  if constexpr (std::is_same_v<N, int>) {
    store_n(p, v, n);
  } else {
    store(p, v);
  }
}

// to[i] = from[i] for i < size, where one of the two types is that of the other's arithmetic.
template <class From, class To>
AIGC_INLINE void convert(const From* from, int64_t size, To* to) {
  for_vectors<Acc<From>>(size, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
}

template <class A, class F, int... i>
AIGC_INLINE Vec<Bits<A>> lane_numbers(F f, std::integer_sequence<int, i...>) {
  return Vec<Bits<A>>{static_cast<Bits<A>>(f(i))...};
}
// f(i) in lane i. Written out: an element with a variable number would keep the vector in memory.
template <class A, class F>
AIGC_INLINE Vec<Bits<A>> lane_numbers(F f) {
  return lane_numbers<A>(f, std::make_integer_sequence<int, kLanes<A>>{});
}

// The lanes of v that hold elements, zero in the others.
template <class A, class N>
AIGC_INLINE Vec<A> only(Vec<A> v, N lanes) {
  if constexpr (!std::is_same_v<N, int>) return v;
  return lane_numbers<A>([](int i) { return i; }) < Bits<A>(lanes) ? v : Vec<A>{};
}

// ---- reductions over lanes, in a fixed order ---------------------------------------------

template <int step, class V, int... i>
AIGC_INLINE V swap_lanes(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ step)...);
}
// Lane i of the result is lane i ^ step of v.
template <class A, int step>
AIGC_INLINE Vec<A> swap_lanes(Vec<A> v) {
  return swap_lanes<step>(v, std::make_integer_sequence<int, kLanes<A>>{});
}

// By way of memory it would take twice as long: 31 ns of 16 lanes.
template <class A, int step = kLanes<A> / 2>
AIGC_INLINE A sum_lanes(Vec<A> v) {
  if constexpr (step == 0)
    return v[0];
  else
    return sum_lanes<A, step / 2>(v + swap_lanes<A, step>(v));
}

}  // namespace aigc_fast

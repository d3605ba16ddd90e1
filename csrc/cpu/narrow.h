// Numbers of one byte, as caches hold them: int8 and the two formats of fp8. Read as pairs of
// vectors, the first half and the second (vector_pair.h), in units of kCacheUnit; written as
// vectors.
#pragma once

#include <aigc_fast/vec_math.h>

namespace aigc_fast {

struct e4m3 {
  uint8_t bits;
};
struct e5m2 {
  uint8_t bits;
};

// What a loaded number is to be multiplied by: a factor on a whole sum costs nothing.
template <class T>
constexpr float kCacheUnit = std::is_same_v<T, e4m3> ? 256 : 1;

// The bits of an fp16 that is the number, for e4m3 times 2^-8: I is int16_t, or vectors of it, that
// hold the byte with its sign extended.
template <class T, class I>
AIGC_INLINE I half_bits(I byte) {
  if constexpr (std::is_same_v<T, e5m2>) {
    return byte << 8;
  } else {
    const I bits = (byte << 7) & static_cast<int16_t>(0xbf80);
    return (bits & 0x3f80) == 0x3f80 ? bits | 0x7fff : bits;  // NaN
  }
}
AIGC_INLINE float half_value(int16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

// In units of kCacheUnit<T>.
template <class T>
AIGC_INLINE double to_double(T x) {
  if constexpr (std::is_same_v<T, int8_t>) {
    return x;
  } else {
    return half_value(half_bits<T>(static_cast<int16_t>(static_cast<int8_t>(x.bits))));
  }
}

typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));

template <class T, class V>
  requires(sizeof(T) == 1)
AIGC_INLINE void load_pair(const T* p, V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (!std::is_same_v<V, Vec<float>>) {
    for (int i = 0; i < lanes; ++i) a[i] = to_double(p[i]), b[i] = to_double(p[lanes + i]);
  } else if constexpr (std::is_same_v<T, int8_t>) {
#if defined(__AVX512F__)
    const auto load = [](const int8_t* q) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
    };
    a = (V)load(p);
    b = (V)load(p + lanes);
#elif defined(__AVX2__)
    const auto load = [](const int8_t* q) {
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)q)));
    };
    a = (V)load(p);
    b = (V)load(p + lanes);
#else
    for (int i = 0; i < lanes; ++i) a[i] = p[i], b[i] = p[lanes + i];
#endif
  } else {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const Shorts bits = half_bits<T>(__builtin_convertvector(bytes, Shorts));
#if defined(__AVX512F__)
    const __m512i half = (__m512i)bits;
    a = (V)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
    b = (V)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#elif defined(__F16C__)
    const __m256i half = (__m256i)bits;
    a = (V)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
    b = (V)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
#else
    for (int i = 0; i < lanes; ++i) a[i] = half_value(bits[i]), b[i] = half_value(bits[lanes + i]);
#endif
  }
}

// The nearest number of T, of two as near the even one; the largest ones for what lies beyond them.
// NaN stays NaN, and is 0 as int8.
template <class T>
  requires(sizeof(T) == 1)
AIGC_INLINE Vec<int32_t> to_narrow(Vec<float> x) {
  typedef Vec<int32_t> I;
  if constexpr (std::is_same_v<T, int8_t>) {
    x = max<float>(min<float>(x == x ? x : Vec<float>{}, broadcast(127.0f)), broadcast(-128.0f));
    return __builtin_convertvector((x + 12582912.0f) - 12582912.0f, I);
  } else {
    constexpr bool e4 = std::is_same_v<T, e4m3>;
    constexpr int mantissa = e4 ? 3 : 2, bias = e4 ? 7 : 15;
    constexpr float largest = e4 ? 448.0f : 57344.0f;
    constexpr float normal = e4 ? 0x1p-6f : 0x1p-14f;                  // the smallest normal number
    constexpr float magic = normal * (int64_t{1} << (23 - mantissa));  // its ulp is that of T
    const I sign = reinterpret_cast<I>(x) >> 24 & 0x80;
    const Vec<float> magnitude = min<float>(abs<float>(x), broadcast(largest));
    const I bits = reinterpret_cast<I>(magnitude);
    const I odd = (bits >> (23 - mantissa)) & 1;
    const I rounded = (bits + ((1 << (22 - mantissa)) - 1) + odd) >> (23 - mantissa);
    const I small = reinterpret_cast<I>(magnitude + magic) - reinterpret_cast<I>(broadcast(magic));
    const I finite = magnitude < normal ? small : rounded - ((127 - bias) << mantissa);
    return (x == x ? finite : I{} + 0x7f) | sign;
  }
}

// The first n of the lanes, to p.
template <class T, class V, class N>
  requires(sizeof(T) == 1)
AIGC_INLINE void store_narrow(T* p, V v, N n) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (!std::is_same_v<V, Vec<float>>) {
    Vec<float> wide = {};
    for (int i = 0; i < lanes; ++i) wide[i] = static_cast<float>(v[i]);
    const Vec<int32_t> numbers = to_narrow<T>(wide);
    for (int i = 0; i < static_cast<int>(n); ++i) {
      const int8_t byte = static_cast<int8_t>(numbers[i]);
      std::memcpy(static_cast<void*>(p + i), &byte, 1);
    }
  } else {
    typedef int8_t Narrow __attribute__((vector_size(kVectorBytes / 4)));
    const Narrow bytes = __builtin_convertvector(to_narrow<T>(v), Narrow);
    std::memcpy(static_cast<void*>(p), &bytes, static_cast<int>(n));
  }
}

// The same for any type that a cache may have.
template <class T, class V, class N>
AIGC_INLINE void store_cached(T* p, V v, N n) {
  if constexpr (sizeof(T) == 1)
    store_narrow(p, v, n);
  else
    store(p, v, n);
}

}  // namespace aigc_fast

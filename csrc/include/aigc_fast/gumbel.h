// Counter-based Gumbel noise, and exp and log, that come out the same to the last bit as in
// aigc_fast/ops/_gumbel.py, which defines them. Compile with -ffp-contract=off: a fused
// multiply-add would round differently.
#pragma once

#include <aigc_fast/vec_math.h>

namespace aigc_fast::gumbel {

using F = Vec<float>;
using I = Vec<int32_t>;
typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
typedef int64_t I64 __attribute__((vector_size(kVectorBytes)));
typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));

constexpr int kWidth = kLanes<float>;
constexpr int64_t kOne = int64_t(1) << 40;  // the weight of the likeliest token

AIGC_INLINE F log_of(I k, F f) {
  const F n = __builtin_convertvector(k, F), tail = log1p_tail(f);
  return (f + (tail + n * -2.12194440e-4f)) + n * 0.693359375f;
}

// x = 2^k * m, m from sqrt(1/2) to sqrt(2)
struct Split {
  I k;
  F m;
};
AIGC_INLINE Split split(F x) {
  const I bits = reinterpret_cast<I>(x), k = (bits - 0x3F3504F3) >> 23;
  return {k, reinterpret_cast<F>(bits - (k << 23))};
}

// log(x) of normal positive numbers
AIGC_INLINE F log(F x) {
  const Split s = split(x);
  return log_of(s.k, s.m - 1.0f);
}

// log(1 + s) for s > -1, precise near 0
AIGC_INLINE F log1p(F s) {
  const Split u = split(s + 1.0f);
  return log_of(u.k, u.k == 0 ? s : u.m - 1.0f);
}

// exp(y) for y <= 0 in units of 2^-40, as floats that await truncation.
AIGC_INLINE F scaled_exp(F y) {
  y = max<float>(y, broadcast(-30.0f));
  const F shifted = y * 1.44269504089f + 12582912.0f, n = shifted - 12582912.0f;
  F r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  const F e = exp_tail(r) + r + 1.0f;
  // The lowest bits of `shifted` are n; those above leave at the top.
  const I scale = (reinterpret_cast<I>(shifted) + (40 + 127)) << 23;
  return e * reinterpret_cast<F>(scale);
}

// The weights exp(y) of the lower and the upper half of the lanes, as integers in units of 2^-40.
struct Weights {
  I64 low, high;
};
AIGC_INLINE Weights weights(F y) {
  const F e = scaled_exp(y);
#if defined(__AVX512F__)
  // GCC 12 goes through memory and 256-bit halves for __builtin_convertvector.
  const __m256 low = _mm512_castps512_ps256((__m512)e);
  const __m256 high = _mm512_extractf32x8_ps((__m512)e, 1);
  return {(I64)_mm512_cvttps_epi64(low), (I64)_mm512_cvttps_epi64(high)};
#else
  HalfF low, high;
  std::memcpy(&low, &e, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&e) + sizeof low, sizeof high);
  return {__builtin_convertvector(low, I64), __builtin_convertvector(high, I64)};
#endif
}

// 1 / x for x > 0, nearly: Newton's steps, which take no division.
inline float reciprocal(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = 0x7EF311C7 - bits;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  for (int i = 0; i < 4; ++i) r = r * (2.0f - x * r);
  return r;
}

// Products of the even 32-bit lanes, 64 bits each.
AIGC_INLINE U64 multiply_even(U a, U b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return ((U64)a & 0xffffffffu) * ((U64)b & 0xffffffffu);
#endif
}

// Philox4x32-10 with the counters (counter, step, step >> 32, 0).
struct Words {
  U word[4];
};
AIGC_INLINE Words philox(U counter, uint64_t step, uint64_t seed) {
  const U zero = {};
  U c0 = counter, c1 = zero + uint32_t(step), c2 = zero + uint32_t(step >> 32), c3 = zero;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  auto multiply = [](U a, uint32_t factor, U& high, U& low) {
    const U b = U{} + factor;
    const U64 even = multiply_even(a, b), odd = multiply_even((U)((U64)a >> 32), b);
    const U64 lower = U64{} + 0xffffffffu;
    low = (U)((even & lower) | (odd << 32));
    high = (U)((even >> 32) | (odd & ~lower));
  };
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Standard Gumbel noise from random words.
AIGC_INLINE F noise_of(U word) {
  F v = (__builtin_convertvector((I)(word >> 1), F) + 0.5f) * 0x1p-31f;
  v = v < 1 - 0x1p-24f ? v : broadcast(1 - 0x1p-24f);
  return -log(-log1p(-v));
}

// 64 tokens share 16 counters: token t takes word t / 16 % 4 of counter t / 64 * 16 + t % 16.
AIGC_INLINE F noise(U token, uint64_t step, uint64_t seed) {
  const Words w = philox((token >> 6 << 4) | (token & 15), step, seed);
  const U which = token >> 4 & 3;
  const U low = which == 0 ? w.word[0] : w.word[1], high = which == 2 ? w.word[2] : w.word[3];
  return noise_of(which < 2 ? low : high);
}

}  // namespace aigc_fast::gumbel

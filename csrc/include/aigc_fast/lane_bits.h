// The result of a vector comparison as bits, one for each lane, and back.
#pragma once

#include <aigc_fast/vec.h>

namespace aigc_fast {

// Bit k is set where lane k of `mask` is true.
template <class A>
AIGC_INLINE uint32_t lane_bits(Vec<Bits<A>> mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask((__m512i)mask);
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 8) return _mm256_movemask_pd((__m256d)mask);
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  if constexpr (sizeof(A) == 8) return _mm_movemask_pd((__m128d)mask);
  return _mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int k = 0; k < kLanes<A>; ++k) bits |= (mask[k] & 1u) << k;
  return bits;
#endif
}

// True in the lanes k whose bit k is set.
template <class A>
AIGC_INLINE Vec<Bits<A>> mask_of(uint32_t bits) {
  return (lane_numbers<A>([](int k) { return 1 << k; }) & static_cast<Bits<A>>(bits)) != 0;
}

}  // namespace aigc_fast

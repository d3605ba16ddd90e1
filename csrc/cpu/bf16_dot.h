// The instruction that adds two products of bf16 at once, of newer AVX-512 processors.
#pragma once

#include <aigc_fast/vec.h>

#if defined(__AVX512BW__)
#define AIGC_BF16_DOT 1
#include <aigc_fast/cpu_features.h>

namespace aigc_fast {

inline bool has_bf16_dot() {
  static const bool has = cpu_features()["avx512bf16"];
  return has;
}

// A value of bf16 and, in the upper half, that of the next step.
enum class Bf16Pair : uint32_t {};

// to[i] = the pair of first[i] and second[i], n of them: a multiple of the lanes.
inline void pair_steps(const bf16* first, const bf16* second, int64_t n, void* to) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const auto wide = [&](const bf16* from) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
    };
    _mm512_storeu_si512(static_cast<Bf16Pair*>(to) + i,
                        _mm512_or_si512(wide(first), _mm512_slli_epi32(wide(second), 16)));
  }
}

}  // namespace aigc_fast
#endif

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

}  // namespace aigc_fast
#endif

// Which instruction sets this machine can run.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace aigc_fast {

inline std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> found;
#if defined(__x86_64__)
  uint32_t a = 0, b = 0, c = 0, d = 0;
  __cpuid(0, a, b, c, d);
  // Whose processor: Intel's own libraries choose their code by that.
  found["intel"] = b == signature_INTEL_ebx && d == signature_INTEL_edx && c == signature_INTEL_ecx;
  __cpuid(1, a, b, c, d);
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  uint64_t xcr0 = 0;
  if (osxsave) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    xcr0 = uint64_t(high) << 32 | low;
  }
  // The system must save the upper halves (ymm), the mask and the 512-bit registers (zmm).
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = ymm && (xcr0 & 0xe0) == 0xe0;
  const bool tiles = (xcr0 & 0x60000) == 0x60000;
  uint32_t b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  __cpuid_count(7, 0, a, b7, c7, d7);
  if (a >= 1) __cpuid_count(7, 1, a71, b, c, d);
  found["fma"] = fma && ymm;
  found["f16c"] = f16c && ymm;
  found["avx2"] = ymm && (b7 >> 5 & 1);
  found["avx512f"] = zmm && (b7 >> 16 & 1);
  found["avx512dq"] = zmm && (b7 >> 17 & 1);
  found["avx512bw"] = zmm && (b7 >> 30 & 1);
  found["avx512vl"] = zmm && (b7 >> 31 & 1);
  found["avx512vbmi"] = zmm && (c7 >> 1 & 1);
  found["avx512vnni"] = zmm && (c7 >> 11 & 1);
  found["avx512bf16"] = zmm && (a71 >> 5 & 1);
  found["avx512fp16"] = zmm && (d7 >> 23 & 1);
  found["amx_tile"] = tiles && (d7 >> 24 & 1);
  found["amx_bf16"] = tiles && (d7 >> 22 & 1);
  found["amx_int8"] = tiles && (d7 >> 25 & 1);
#endif
  return found;
}

}  // namespace aigc_fast

// What quantized_linear.cuh multiplies: codes and activations as the operands of tensor cores, and
// the kernel that brings rows of x into their order where they are not in it.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace aigc_fast {

__device__ inline void unpack_halves(uint2 raw, float (&out)[4]) {
  const float2 low = half_pair(raw.x), high = half_pair(raw.y);
  out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
}

// How a step of x and codes becomes words of the two operands: 8 columns of a row, as pairs of
// 16-bit numbers (columns 0 2, 1 3, 4 6, 5 7) or as int8 (0..3, 4..7).
template <class X>
struct Operand {
  using Number = X;
  using Sum = float;
  static constexpr int kWords = 4, kParts = 1;
  static constexpr bool kBf16 = std::is_same_v<X, cuda_bf16>;
  static constexpr uint32_t kOnes = kBf16 ? 0x3f803f80 : 0x3c003c00;
  // 128 (bf16) and 1024 (fp16): the lowest bit is worth one. So a code needs no conversion.
  static constexpr uint32_t kRaised = kBf16 ? 0x43004300 : 0x64006400;
  template <int BITS>
  static constexpr float kUnit = 1;

  static __device__ void codes(const uint32_t (&raw)[1], uint32_t (&out)[4]) {  // 4 bits
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = raw[0] >> (i % 2 * 8 + i / 2 * 4);
      out[i] = minus_pair(and_or(word, 0x000f000f, kRaised), kRaised | 0x00080008, X{});
    }
  }
  // 8 bits. In bf16 only 7 have a place below the exponent: the eighth says whether 256 or 128 is
  // to be subtracted.
  static __device__ void codes(const uint32_t (&raw)[2], uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = raw[i / 2] >> (i % 2 * 8);
      const uint32_t middle = kBf16 ? (word & 0x00800080) ^ 0x43804380 : kRaised | 0x00800080;
      out[i] = minus_pair(and_or(word, kBf16 ? 0x007f007f : 0x00ff00ff, kRaised), middle, X{});
    }
  }
  static __device__ void activations(const uint4 (&raw)[1], int, uint32_t (&out)[1][4]) {
    out[0][0] = __byte_perm(raw[0].x, raw[0].y, 0x5410);
    out[0][1] = __byte_perm(raw[0].x, raw[0].y, 0x7632);
    out[0][2] = __byte_perm(raw[0].z, raw[0].w, 0x5410);
    out[0][3] = __byte_perm(raw[0].z, raw[0].w, 0x7632);
  }
};

// fp32 is the sum of three bf16 numbers, each the upper half of what the ones before leave.
template <>
struct Operand<float> : Operand<cuda_bf16> {
  static constexpr int kParts = 3;

  static __device__ void activations(const uint4 (&raw)[2], int, uint32_t (&out)[3][4]) {
    uint32_t x[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                     raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
    for (int part = 0; part < 3; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = i / 2 * 4 + i % 2;
        out[part][i] = __byte_perm(x[column], x[column + 2], 0x7632);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float all = __uint_as_float(x[i]), upper = __uint_as_float(x[i] & 0xffff0000u);
        // All of an infinity is in its upper half.
        x[i] = part == 0 && fabsf(all) == INFINITY ? 0u : __float_as_uint(all - upper);
      }
    }
  }
};

template <>
struct Operand<int8_t> {
  using Number = int8_t;
  using Sum = int;
  static constexpr int kWords = 2, kParts = 1;
  static constexpr uint32_t kOnes = 0x01010101;
  template <int BITS>
  static constexpr float kUnit = BITS == 4 ? 1 / 16.0f : 1;  // of the sums

  // 4 bits, in the upper half of a byte: 16 (code - 8) once the highest bit is turned over.
  static __device__ void codes(const uint32_t (&raw)[1], uint32_t (&out)[2]) {
    out[0] = (raw[0] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
    out[1] = (raw[0] & 0xf0f0f0f0u) ^ 0x80808080u;
  }
  static __device__ void codes(const uint32_t (&raw)[2], uint32_t (&out)[2]) {
    out[0] = raw[0] ^ 0x80808080u;
    out[1] = raw[1] ^ 0x80808080u;
  }
  static __device__ void activations(const uint4 (&raw)[1], int step, uint32_t (&out)[1][2]) {
    out[0][0] = step ? raw[0].z : raw[0].x;
    out[0][1] = step ? raw[0].w : raw[0].y;
  }
};

// ---- rows of x ----------------------------------------------------------------------------------

// x (rows, in_features) with each group padded to whole steps of 32 columns. Columns 8 t .. 8 t + 7
// of a step are what lane t of four multiplies. As they are, in the type of x; or as int8 codes,
// round(x * 127 / max|x|) with max|x| / 127 of each group in scales: then the columns of t in two
// steps lie side by side, to be 16 bytes.
struct ArrangeRows {
  const void* x;
  void* out;
  float* scales;           // (groups, 8), or null
  int64_t x_row, out_row;  // elements
  int in_features, groups, group_size, group_steps, threads;
};

constexpr int kMaxArrangeThreads = 256;

// The larger, or NaN if one is.
__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// A block arranges one group of one row.
template <class T, bool ROUND>
__global__ void __launch_bounds__(kMaxArrangeThreads) arrange_kernel(const ArrangeRows p) {
  const int row = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int begin = group * p.group_size, size = min(p.group_size, p.in_features - begin);
  const T* x = static_cast<const T*>(p.x) + row * p.x_row + begin;
  float top = 0;
  if constexpr (ROUND) {
    __shared__ float tops[kMaxArrangeThreads / 32];
    for (int k = threadIdx.x; k < size; k += p.threads) top = larger(top, fabsf(to_float(x[k])));
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      top = larger(top, __shfl_xor_sync(kAllLanes, top, mask));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < p.threads / 32; ++w) top = larger(top, tops[w]);
    if (threadIdx.x == 0) p.scales[group * 8 + row] = top / 127;
  }
  // Where 127 / top would pass the largest fp32 the reference has zeros.
  const float factor = top > 3.7323e-37f ? 127 / top : 0.0f;
  for (int k = threadIdx.x; k < p.group_steps * 32; k += p.threads) {
    const int step = group * p.group_steps + k / 32, column = k % 32;
    if constexpr (ROUND) {
      const float code = k < size ? rintf(to_float(x[k]) * factor) : 0.0f;
      const int64_t at = step / 2 * 64 + column / 8 * 16 + step % 2 * 8 + column % 8;
      static_cast<int8_t*>(p.out)[row * p.out_row + at] = static_cast<int8_t>(code);
    } else {
      static_cast<T*>(p.out)[row * p.out_row + int64_t{step} * 32 + column] = k < size ? x[k] : T{};
    }
  }
}

}  // namespace aigc_fast

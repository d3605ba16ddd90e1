// What kernels need of the GPU below plain CUDA C++: 16-byte pieces of each element type, and
// asynchronous copies to shared memory. tests/kernels/cuda_on_cpu.h holds the same for a CPU, so
// that the kernels themselves can be run where there is no GPU.
#pragma once

#include <cstdint>

#if !defined(AIGC_FAST_CUDA_ON_CPU)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace aigc_fast {

using cuda_bf16 = __nv_bfloat16;
using cuda_fp16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(cuda_bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(cuda_fp16 x) { return __half2float(x); }
__device__ inline void from_float(float x, float* y) { *y = x; }
__device__ inline void from_float(float x, cuda_bf16* y) { *y = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, cuda_fp16* y) { *y = __float2half_rn(x); }

__device__ inline float2 half_pair(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// The shared memory that the launch asked for.
__device__ inline uint4* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

// 16 bytes from global to shared memory, past the registers and the L1 cache; zeros if not `valid`.
// Both addresses are multiples of 16, and `from` is a valid address in either case.
__device__ inline void copy_async(uint4* to, const void* from, bool valid) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Ends a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are on their way.
template <int pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace aigc_fast
#endif

namespace aigc_fast {

// Elements of T in 16 bytes.
template <class T>
constexpr int kPiece = 16 / sizeof(T);

__device__ inline void unpack(uint4 raw, float* out, const float*) {
  out[0] = __uint_as_float(raw.x);
  out[1] = __uint_as_float(raw.y);
  out[2] = __uint_as_float(raw.z);
  out[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(uint4 raw, float* out, const cuda_bf16*) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(uint4 raw, float* out, const cuda_fp16*) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = half_pair(words[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace aigc_fast

// What kernels need of the GPU below plain CUDA C++: 16-byte pieces of each element type,
// asynchronous copies to shared memory, and tensor cores. tests/kernels/cuda_on_cpu.h holds the
// same for a CPU, so that the kernels themselves can be run where there is no GPU.
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
// Both addresses are multiples of 16; nothing is read at `from` if not `valid`.
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

// a & mask | bits, in one instruction: left to itself the compiler takes two.
__device__ inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
  return y;
}

// a - b of two halves of a word each.
__device__ inline uint32_t minus_pair(uint32_t a, uint32_t b, cuda_bf16) {
  const __nv_bfloat162 y = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                   *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&y);
}
__device__ inline uint32_t minus_pair(uint32_t a, uint32_t b, cuda_fp16) {
  const __half2 y =
      __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&y);
}

// c += a * b on tensor cores: 16 x 16 times 16 x 8 numbers, or 16 x 32 times 32 x 8 of int8, a
// warp. With g = lane / 4 and t = lane % 4, a lane holds of a the rows g (a[0], a[2]) and g + 8
// (a[1], a[3]), of b the column g; of these the words t (a[0], a[1], b[0]) and t + 4; and of c the
// rows g (c[0], c[1]) and g + 8, columns 2 t and 2 t + 1.
__device__ inline void add_product(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                   cuda_bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void add_product(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                   cuda_fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void add_product(int (&c)[4], const uint32_t (&a)[4], const uint32_t* b, int8_t) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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

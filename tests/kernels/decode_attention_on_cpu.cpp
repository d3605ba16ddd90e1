// The CUDA kernels of decode_attention on a CPU, for test_decode_attention_cuda.py.
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/decode_attention.cuh"

using namespace aigc_fast;

// sizes: bytes of the memory behind each of the five pointers. p.splits is 0 for the usual choice.
extern "C" void run(int dtype, DecodeAttention p, const int64_t* sizes) {
  const on_cpu::Guarded query(p.query, sizes[0]), keys(p.keys, sizes[1]), values(p.values, sizes[2]),
      out(sizes[3]), lse(sizes[4]);
  void* const out_here = p.out;
  float* const lse_here = p.lse;
  p.query = query.get();
  p.keys = keys.get();
  p.values = values.get();
  p.out = out.get();
  p.lse = reinterpret_cast<float*>(lse.get());
  if (p.splits == 0) p.splits = choose_splits(p.batch * p.kv_heads, p.capacity, 132);
  const int64_t rows = p.batch * p.q_len * p.heads * p.splits;
  const on_cpu::Guarded parts(rows * p.head_dim * 4), parts_lse(rows * 4);
  p.parts = reinterpret_cast<float*>(parts.get());
  p.parts_lse = reinterpret_cast<float*>(parts_lse.get());
  auto launch = [](auto kernel, int64_t blocks, int shared, const DecodeAttention& arguments) {
    on_cpu::launch(kernel, blocks, kWarps * 32, shared, arguments);
  };
  if (dtype == 0) launch_decode_attention<float>(p, launch);
  if (dtype == 1) launch_decode_attention<cuda_bf16>(p, launch);
  if (dtype == 2) launch_decode_attention<cuda_fp16>(p, launch);
  std::memcpy(out_here, p.out, sizes[3]);
  std::memcpy(lse_here, p.lse, sizes[4]);
}

// The CUDA kernels of quantized_linear on a CPU, for test_quantized_linear_cuda.py.
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/quantized_linear.cuh"

using namespace aigc_fast;

// p holds the pointers, the counts of rows, tiles, groups and out_features, the bytes of a block
// and the type; bytes: of the memory behind x, weight, bias and out.
extern "C" void run(QuantizedGemv p, int bits, int in_features, int group_size, bool quantize,
                    const int64_t* bytes) {
  const on_cpu::Guarded x(p.x, bytes[0]), weight(p.weight, bytes[1]), bias(p.bias, bytes[2]),
      out(bytes[3]);
  void* const out_here = p.out;
  p.x = x.get();
  p.weight = weight.get();
  if (p.bias) p.bias = bias.get();
  p.out = out.get();
  std::vector<std::unique_ptr<on_cpu::Guarded>> scratch;
  auto allocate = [&](int64_t size) {
    return scratch.emplace_back(std::make_unique<on_cpu::Guarded>(size))->get();
  };
  auto launch = [](auto kernel, int64_t blocks, int threads, int shared, const auto& arguments) {
    on_cpu::launch(kernel, blocks, threads, shared, arguments);
  };
  auto run = [&]<class T>(T) {
    launch_quantized_linear<T>(p, bits, in_features, group_size, quantize, allocate, launch);
  };
  if (p.type == Element::kFloat) run(float{});
  if (p.type == Element::kBFloat16) run(cuda_bf16{});
  if (p.type == Element::kHalf) run(cuda_fp16{});
  std::memcpy(out_here, p.out, bytes[3]);
}

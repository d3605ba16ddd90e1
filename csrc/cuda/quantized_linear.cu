// The operator around the kernels of quantized_linear.cuh.
#include "quantized_linear.cuh"

#include <vector>

#include "tensor.h"

#include <aigc_fast/quantized_format.h>

namespace aigc_fast {
namespace {

Tensor quantized_linear(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias_in,
                        int64_t bits, int64_t group_size, int64_t out_features,
                        bool quantize_activations) {
  const QuantizedFormat f = format_of(weight, bits, group_size, out_features);
  check_operands(f, x_in, bias_in, out_features);
  require(weight.is_contiguous() && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
          "weight must be contiguous and aligned to 16 bytes");
  const int64_t in_features = x_in.size(-1), rows = x_in.numel() / in_features;
  require(rows <= kMaxGemvRows, "x must have at most ", kMaxGemvRows, " rows, got ", rows);
  require(f.columns() < (1 << 24) && out_features < (1 << 28), "weight is too large");

  std::vector<int64_t> sizes(x_in.sizes().begin(), x_in.sizes().end());
  sizes.back() = out_features;
  Tensor out = torch::stable::new_empty(x_in, sizes);
  if (rows == 0) return out;

  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  MaybeTensor bias;
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  QuantizedGemv p{};
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.tile_bytes = f.tile_bytes();
  p.rows = rows, p.out_features = out_features, p.tiles = weight.size(0);
  p.groups = f.groups, p.block_bytes = f.block_bytes();
  p.has_minimum = f.has_minimum;

  std::vector<Tensor> scratch;
  auto allocate = [&](int64_t bytes) {
    scratch.push_back(torch::stable::new_empty(x, {bytes}, ScalarType::Byte));
    return static_cast<char*>(scratch.back().mutable_data_ptr());
  };
  auto launch = [&](auto kernel, int64_t blocks, int threads, int shared, const auto& arguments) {
    device.launch(kernel, blocks, threads, shared, arguments);
  };
  auto run = [&]<class T>(T, Element type) {
    p.type = type;
    launch_quantized_linear<T>(p, bits, in_features, group_size, quantize_activations, allocate,
                               launch);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run(float{}, Element::kFloat);
      break;
    case ScalarType::BFloat16:
      run(cuda_bf16{}, Element::kBFloat16);
      break;
    case ScalarType::Half:
      run(cuda_fp16{}, Element::kHalf);
      break;
    default:
      require(false, "x must be float32, bfloat16 or float16");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast_cuda, CUDA, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace
}  // namespace aigc_fast

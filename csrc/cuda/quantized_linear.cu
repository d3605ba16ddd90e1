// The operator around the kernels of quantized_linear.cuh.
#include "quantized_linear.cuh"

#include <vector>

#include "tensor.h"

namespace aigc_fast {
namespace {

Tensor quantized_linear(const Tensor& x_in, const Tensor& weight,
                        const std::optional<Tensor>& bias_in, int64_t bits, int64_t group_size,
                        int64_t out_features, bool quantize_activations) {
  require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  require(group_size > 0 && group_size <= 65536 && group_size % (32 / bits) == 0,
          "group_size must be a multiple of ", 32 / bits, " up to 65536, got ", group_size);
  require(weight.dim() == 3 && weight.scalar_type() == ScalarType::Byte && weight.size(1) > 0,
          "weight must be uint8 of 3 dimensions and have groups");
  require(weight.is_contiguous() && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
          "weight must be contiguous and aligned to 16 bytes");
  const int64_t groups = weight.size(1), block_bytes = weight.size(2);
  const int64_t symmetric = 2 * group_size * bits + 32;
  require(block_bytes == symmetric || block_bytes == symmetric + 32, "weight must have ", symmetric,
          " or ", symmetric + 32, " bytes a block, got ", block_bytes);
  require(out_features > 0 && weight.size(0) == (out_features + 15) / 16,
          "weight must have out_features / 16 tiles");
  require(x_in.dim() > 0, "x must have at least 1 dimension");
  const int64_t in_features = x_in.size(-1), columns = groups * group_size;
  require(in_features > columns - group_size && in_features <= columns,
          "x must have in_features of weight, at most ", columns, ", got ", in_features);
  const int64_t rows = x_in.numel() / in_features;
  require(rows <= kMaxGemvRows, "x must have at most ", kMaxGemvRows, " rows, got ", rows);
  require(columns < (1 << 24) && out_features < (1 << 28), "weight is too large");
  if (bias_in)
    require(bias_in->dim() == 1 && bias_in->size(0) == out_features &&
                bias_in->scalar_type() == x_in.scalar_type(),
            "bias must have shape (", out_features, ",) and the dtype of x");

  std::vector<int64_t> sizes(x_in.sizes().begin(), x_in.sizes().end());
  sizes.back() = out_features;
  Tensor out = torch::stable::new_empty(x_in, sizes);
  if (rows == 0) return out;

  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  QuantizedGemv p{};
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.tile_bytes = groups * block_bytes;
  p.rows = rows, p.out_features = out_features, p.tiles = weight.size(0);
  p.groups = groups, p.block_bytes = block_bytes;
  p.has_minimum = block_bytes != symmetric;

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

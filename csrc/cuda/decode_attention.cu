// The operator around the kernels of decode_attention.cuh.
#include "decode_attention.cuh"

#include <cmath>

#include "tensor.h"

namespace aigc_fast {
namespace {

std::tuple<Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& keys,
                                            const Tensor& values, const Tensor& lengths,
                                            std::optional<double> scale) {
  require(query.dim() == 4 && keys.dim() == 4 && values.dim() == 4 && lengths.dim() == 1,
          "query and caches must have 4 dimensions, cache_lengths one");
  const int64_t batch = query.size(0), q_len = query.size(1), heads = query.size(2);
  const int64_t head_dim = query.size(3), capacity = keys.size(1), kv_heads = keys.size(2);
  for (int d = 0; d < 4; ++d)
    require(keys.size(d) == values.size(d), "value_cache must have the shape of key_cache");
  require(keys.size(0) == batch && keys.size(3) == head_dim && lengths.size(0) == batch,
          "key_cache and cache_lengths must have the batch and head_dim of query");
  require(kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads * q_len <= kMaxRows,
          "a key/value head must have at most ", kMaxRows, " query rows");
  require(keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(),
          "the caches must have the dtype of query");
  const auto length_type = lengths.scalar_type();
  require(length_type == ScalarType::Int || length_type == ScalarType::Long,
          "cache_lengths must be int32 or int64");
  const int64_t piece = query.scalar_type() == ScalarType::Float ? 4 : 8;
  require(head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % piece == 0,
          "head_dim must be a multiple of ", piece, " and at most ", kMaxHeadDim);
  for (const Tensor* x : {&keys, &values})
    require(x->stride(3) == 1 && x->stride(0) % piece == 0 && x->stride(1) % piece == 0 &&
                x->stride(2) % piece == 0 &&
                reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
            "the caches must be aligned to 16 bytes");
  require(capacity < (int64_t{1} << 30), "capacity must be below 2^30");

  Tensor out = torch::stable::new_empty(query, {batch, q_len, heads, head_dim});
  Tensor lse = torch::stable::new_empty(query, {batch, q_len, heads}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  const Device device(query);
  DecodeAttention p{};
  p.query = query.const_data_ptr();
  p.keys = keys.const_data_ptr();
  p.values = values.const_data_ptr();
  p.lengths = lengths.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.query_batch = query.stride(0), p.query_seq = query.stride(1);
  p.query_head = query.stride(2), p.query_dim = query.stride(3);
  p.key_batch = keys.stride(0), p.key_seq = keys.stride(1), p.key_head = keys.stride(2);
  p.value_batch = values.stride(0), p.value_seq = values.stride(1);
  p.value_head = values.stride(2), p.lengths_stride = lengths.stride(0);
  p.batch = batch, p.q_len = q_len, p.heads = heads, p.kv_heads = kv_heads;
  p.head_dim = head_dim, p.capacity = capacity;
  p.lengths_are_long = length_type == ScalarType::Long;
  p.scale = scale ? *scale : 1 / std::sqrt(static_cast<double>(head_dim));
  p.splits = choose_splits(batch * kv_heads, capacity, device.processors());
  MaybeTensor parts, parts_lse;
  if (p.splits > 1) {
    parts = torch::stable::new_empty(query, {lse.numel(), p.splits, head_dim}, ScalarType::Float);
    parts_lse = torch::stable::new_empty(query, {lse.numel(), p.splits}, ScalarType::Float);
    p.parts = parts->mutable_data_ptr<float>();
    p.parts_lse = parts_lse->mutable_data_ptr<float>();
  }
  auto launch = [&](auto kernel, int64_t blocks, int shared, const DecodeAttention& arguments) {
    require(blocks < (int64_t{1} << 31), "batch * num_kv_heads is too large");
    device.launch(kernel, blocks, kWarps * 32, shared, arguments);
  };
  switch (query.scalar_type()) {
    case ScalarType::BFloat16:
      launch_decode_attention<cuda_bf16>(p, launch);
      break;
    case ScalarType::Half:
      launch_decode_attention<cuda_fp16>(p, launch);
      break;
    case ScalarType::Float:
      launch_decode_attention<float>(p, launch);
      break;
    default:
      require(false, "query must be float32, bfloat16 or float16");
  }
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast_cuda, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace
}  // namespace aigc_fast

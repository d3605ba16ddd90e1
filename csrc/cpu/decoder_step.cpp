// The operator decoder_step: what it takes, and its refusals (decoder_step.h does the work).
#include "decoder_step.h"
#include "layer_reader.h"

namespace aigc_fast {
namespace {

std::vector<int64_t> read_positions(const Tensor& lengths, const DecoderSizes& s) {
  require(lengths.dim() == 1 && lengths.size(0) == s.batch && lengths.is_contiguous() &&
              lengths.scalar_type() == ScalarType::Int,
          "lengths must be int32 of shape (", s.batch, ",)");
  std::vector<int64_t> positions(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    positions[b] = data<int32_t>(lengths)[b];
    require(positions[b] >= 0 && positions[b] < s.capacity, "lengths must be in [0, ", s.capacity,
            "), got ", positions[b], " for sequence ", b);
  }
  return positions;
}

// Of the caches, which must be of one kind.
DecoderSizes sizes_of(const Tensor& hidden, const Tensors& caches, const MaybeTensor& table) {
  const Tensor& cache = caches[0];
  require(cache.dim() == 4, "caches must have 4 dimensions");
  DecoderSizes s{};
  s.batch = hidden.size(0);
  s.hidden = hidden.size(1);
  if (table) s.pages = {*table, cache, s.batch};
  require(table || cache.size(0) == s.batch, "caches must have the batch of hidden");
  s.capacity = cache.size(1) * (table ? table->size(1) : 1);
  s.kv_heads = cache.size(2), s.head_dim = cache.size(3);
  s.key_batch = cache.stride(0), s.key_seq = cache.stride(1), s.key_head = cache.stride(2);
  require(cache.scalar_type() != ScalarType::Double, "caches must be of 32, 16 or 8 bits");
  require(s.head_dim > 0 && s.head_dim % 2 == 0 && s.kv_heads > 0 && cache.stride(3) == 1,
          "caches must have an even, contiguous head_dim");
  for (const Tensor& t : caches)
    require(
        t.scalar_type() == cache.scalar_type() && same_shape(t, cache) && same_strides(t, cache),
        "caches must all have one dtype, one shape and one layout");
  return s;
}

// Contiguous tables of cos or sin, of all positions.
Tensors angles_of(const Tensors& tables, size_t count, const DecoderSizes& s) {
  require(!tables.empty() && tables.size() == count, "cos and sin must be as many, one or more");
  Tensors out;
  for (const Tensor& t : tables) {
    require(t.dim() == 2 && t.size(0) >= s.capacity && t.size(1) == s.turning / 2 &&
                t.scalar_type() == ScalarType::Float,
            "cos and sin must be float32 with a row for each of ", s.capacity, " positions");
    out.push_back(as_contiguous(t));
  }
  return out;
}

// Of keys and values of each layer in turn, and of each head.
std::vector<float> cache_scales(const MaybeTensor& x, int64_t caches, const DecoderSizes& s) {
  std::vector<float> scales(caches * s.kv_heads, 1.0f);
  if (x) {
    const Tensor given = as_contiguous(*x);
    require(given.scalar_type() == ScalarType::Float && given.dim() == 2 &&
                given.size(0) == caches && given.size(1) == s.kv_heads,
            "cache_scales must be float32 of shape (", caches, ", ", s.kv_heads, ")");
    std::copy_n(data<float>(given), scales.size(), scales.begin());
  }
  return scales;
}

void check_options(const LayerOptions& o, size_t layers) {
  const auto count = [&](size_t given, size_t expected, const char* name) {
    require(given == expected, name, " must hold ", expected, ", got ", given);
  };
  if (o.qkv_biases) count(o.qkv_biases->size(), layers, "qkv_biases");
  if (o.query_key_norms) count(o.query_key_norms->size(), 2 * layers, "query_key_norms");
  if (o.post_norms) count(o.post_norms->size(), 2 * layers, "post_norms");
  if (o.routers) count(o.routers->size(), layers, "routers");
  if (!o.rotations.empty()) count(o.rotations.size(), layers, "rotations");
  if (!o.windows.empty()) count(o.windows.size(), layers, "windows");
}

Tensor decoder_step(const Tensor& hidden_in, const Tensors& weights, const Tensors& caches,
                    const Tensor& lengths, const Tensors& cos_in, const Tensors& sin_in, double eps,
                    double scale, bool quantize_activations, const MaybeTensor& table,
                    const MaybeTensor& scales_in, const MaybeTensors& qkv_biases,
                    const MaybeTensors& query_key_norms, const MaybeTensors& post_norms,
                    const std::vector<int64_t>& rotations, const std::vector<int64_t>& windows,
                    std::optional<double> softcap, double residual_scale, bool gelu,
                    const MaybeTensors& routers, int64_t experts_per_token,
                    bool normalize_experts) {
  const LayerOptions o{qkv_biases, query_key_norms, post_norms, routers, rotations, windows};
  require(hidden_in.dim() == 2 && hidden_in.size(1) > 0, "hidden must have 2 dimensions");
  const size_t num_layers = caches.size() / 2;
  require(num_layers > 0 && caches.size() % 2 == 0, "caches must be keys and values of each layer");
  // Four products of each layer, and its two norms where they stand before attention and MLP.
  const bool pre_norms = weights.size() == 6 * num_layers + 1;
  require(pre_norms || weights.size() == 4 * num_layers + 1,
          "weights must be 6 or 4 tensors a layer and the last norm");
  check_options(o, num_layers);
  require(!softcap || *softcap > 0, "softcap must be positive");
  const Tensor hidden = as_contiguous(hidden_in);
  const ScalarType dtype = hidden.scalar_type();
  require(dtype != ScalarType::Double, "hidden must be float32, bfloat16 or float16");

  DecoderSizes s = sizes_of(hidden, caches, table);
  const int64_t attended = DecoderWeight(weights[pre_norms + 1]).format.columns();
  s.heads = attended / s.head_dim;
  s.inner = DecoderWeight(weights[2 * pre_norms + 3]).format.columns();
  require(routers || experts_per_token == 0, "experts_per_token must be 0 without routers, got ",
          experts_per_token);
  if (routers) {
    require(!routers->empty() && (*routers)[0].dim() == 2, "routers must have 2 dimensions");
    s.experts = (*routers)[0].size(0), s.per_token = experts_per_token;
    require(0 < s.per_token && s.per_token <= s.experts, "experts_per_token must be in [1, ",
            s.experts, "], got ", s.per_token);
  }
  require(s.heads * s.head_dim == attended && s.heads % s.kv_heads == 0,
          "the output projection must take a multiple of the heads of the caches");
  require(!cos_in.empty() && cos_in[0].dim() == 2, "cos must be tables of 2 dimensions");
  s.turning = 2 * cos_in[0].size(1);
  require(s.turning <= s.head_dim, "cos must have at most ", s.head_dim / 2, " columns");
  const Tensors cos = angles_of(cos_in, sin_in.size(), s), sin = angles_of(sin_in, cos.size(), s);
  const std::vector<float> scales = cache_scales(scales_in, caches.size(), s);
  const std::vector<int64_t> positions = read_positions(lengths, s);
  for (int64_t b = 0; table && b < s.batch; ++b)
    s.pages.check(b, 0, positions[b] + 1, caches[0].size(0));
  const DecoderNumbers numbers{
      static_cast<float>(eps),
      static_cast<float>(scale),
      static_cast<float>(softcap.value_or(0)),
      static_cast<float>(residual_scale),
      quantize_activations,
      gelu,
      query_key_norms && (*query_key_norms)[0].numel() != s.head_dim,
      normalize_experts,
  };

  Tensor out = empty({s.batch, s.hidden}, dtype);
  if (s.batch == 0) return out;
  LayerReader reader{.weights = weights,
                     .caches = caches,
                     .cos = cos,
                     .sin = sin,
                     .options = o,
                     .scales = scales,
                     .positions = positions,
                     .s = s,
                     .pre_norms = pre_norms,
                     .joint_norms = numbers.joint_norms,
                     .floats = Floats(dtype)};
  std::vector<float> result;
  dispatch_cache(caches[0], [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) {
      std::vector<DecoderLayer<T>> layers;
      for (size_t l = 0; l < num_layers; ++l) layers.push_back(reader.read<T>(l));
      auto run = [&]<class P>(std::type_identity<P>) {
        result = DecoderStep<P>(s, numbers, std::move(layers), positions, Floats::copy(hidden))
                     .run(reader.norm(weights.back()));
      };
#if AIGC_AMX
      if constexpr (std::is_same_v<T, int8_t>)
        if (Int8Products::fits(s.group(), s.head_dim))
          return run(std::type_identity<Int8Products>{});
#endif
      if (s.group() == 1)
        run(std::type_identity<Products<float, T, 1>>{});
      else if (s.group() == 2)
        run(std::type_identity<Products<float, T, 2>>{});
      else
        run(std::type_identity<Products<float, T, 4>>{});
    }
  });
  dispatch(out, "hidden", [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>)
      convert(result.data(), result.size(), mutable_data<T>(out));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("decoder_step", TORCH_BOX(&decoder_step)); }

}  // namespace
}  // namespace aigc_fast

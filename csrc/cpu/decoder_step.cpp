// The operator decoder_step: what it takes, and its refusals (decoder_step.h does the work).
#include "decoder_step.h"

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

std::vector<float> floats_of(const Tensor& x) {
  std::vector<float> out(x.numel());
  dispatch(x, "hidden", [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) convert(data<T>(x), out.size(), out.data());
  });
  return out;
}

Tensor decoder_step(const Tensor& hidden_in, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& caches, const Tensor& lengths, const Tensor& cos_in,
                    const Tensor& sin_in, double eps, double scale, bool quantize_activations,
                    const MaybeTensor& table, const MaybeTensor& scales_in) {
  require(hidden_in.dim() == 2 && hidden_in.size(1) > 0, "hidden must have 2 dimensions");
  require(weights.size() > kLayerTensors && weights.size() % kLayerTensors == 1,
          "weights must be 6 tensors a layer and the last norm");
  const size_t num_layers = weights.size() / kLayerTensors;
  require(caches.size() == 2 * num_layers && caches[0].dim() == 4,
          "caches must be keys and values of each layer");
  const Tensor hidden = as_contiguous(hidden_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const ScalarType dtype = hidden.scalar_type();
  require(dtype != ScalarType::Double, "hidden must be float32, bfloat16 or float16");

  DecoderSizes s{};
  s.batch = hidden.size(0);
  s.hidden = hidden.size(1);
  const Tensor& cache = caches[0];
  if (table) s.pages = {*table, cache, s.batch};
  require(table || cache.size(0) == s.batch, "caches must have the batch of hidden");
  s.capacity = cache.size(1) * (table ? table->size(1) : 1);
  s.kv_heads = cache.size(2), s.head_dim = cache.size(3);
  s.key_batch = cache.stride(0), s.key_seq = cache.stride(1), s.key_head = cache.stride(2);
  require(cache.scalar_type() != ScalarType::Double, "caches must be of 32, 16 or 8 bits");
  require(s.head_dim > 0 && s.head_dim % 2 == 0 && s.kv_heads > 0 && cache.stride(3) == 1,
          "caches must have an even, contiguous head_dim");
  const int64_t attended = DecoderWeight(weights[2]).format.columns();
  s.heads = attended / s.head_dim;
  s.inner = DecoderWeight(weights[5]).format.columns();
  require(s.heads * s.head_dim == attended && s.heads % s.kv_heads == 0,
          "the output projection must take a multiple of the heads of the caches");
  for (const Tensor& t : caches)
    require(
        t.scalar_type() == cache.scalar_type() && same_shape(t, cache) && same_strides(t, cache),
        "caches must all have one dtype, one shape and one layout");
  for (const Tensor* t : {&cos, &sin})
    require(t->dim() == 2 && t->size(0) >= s.capacity && t->size(1) == s.head_dim / 2 &&
                t->scalar_type() == ScalarType::Float,
            "cos and sin must be float32 with a row for each of ", s.capacity, " positions");
  // Of keys and values of each layer in turn, and of each head.
  std::vector<float> scales(caches.size() * s.kv_heads, 1.0f);
  if (scales_in) {
    const Tensor given = as_contiguous(*scales_in);
    require(given.scalar_type() == ScalarType::Float && given.dim() == 2 &&
                given.size(0) == int64_t(caches.size()) && given.size(1) == s.kv_heads,
            "cache_scales must be float32 of shape (", caches.size(), ", ", s.kv_heads, ")");
    std::copy_n(data<float>(given), scales.size(), scales.begin());
  }
  auto is_norm = [&](const Tensor& t) {
    return t.dim() == 1 && t.size(0) == s.hidden && t.is_contiguous() && t.scalar_type() == dtype;
  };
  const std::vector<int64_t> positions = read_positions(lengths, s);
  for (int64_t b = 0; table && b < s.batch; ++b)
    s.pages.check(b, 0, positions[b] + 1, cache.size(0));

  Tensor out = empty({s.batch, s.hidden}, dtype);
  if (s.batch == 0) return out;
  std::vector<std::vector<float>> converted;
  converted.reserve(2 * num_layers + 1);
  const auto norm = [&](const Tensor& t) {
    require(is_norm(t), "a norm must have shape (hidden_size,) and the dtype of hidden");
    return dtype == ScalarType::Float ? data<float>(t)
                                      : converted.emplace_back(floats_of(t)).data();
  };
  std::vector<float> result;
  dispatch_cache(cache, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) {
      std::vector<DecoderLayer<T>> layers;
      for (size_t l = 0; l < num_layers; ++l) {
        const Tensor* w = &weights[kLayerTensors * l];
        const float* scale_of_keys = scales.data() + 2 * l * s.kv_heads;
        const DecoderLayer<T>& layer = layers.emplace_back(DecoderLayer<T>{
            norm(w[0]), DecoderWeight(w[1]), DecoderWeight(w[2]), norm(w[3]), DecoderWeight(w[4]),
            DecoderWeight(w[5]), mutable_data<T>(caches[2 * l]), mutable_data<T>(caches[2 * l + 1]),
            scale_of_keys, scale_of_keys + s.kv_heads});
        auto fits = [](const DecoderWeight& weight, int64_t rows, int64_t columns) {
          return weight.format.columns() == columns && weight.rows() - rows >= 0 &&
                 weight.rows() - rows < kTileRows;
        };
        require(fits(layer.qkv, s.packed(), s.hidden) && fits(layer.output, s.hidden, attended) &&
                    s.inner % kTileRows == 0 && fits(layer.gate_up, 2 * s.inner, s.hidden) &&
                    fits(layer.down, s.hidden, s.inner),
                "the weights of layer ", l, " do not fit together");
      }
      auto run = [&]<class P>(std::type_identity<P>) {
        result =
            DecoderStep<P>(s, std::move(layers), positions, floats_of(hidden), data<float>(cos),
                           data<float>(sin), eps, scale, quantize_activations)
                .run(norm(weights.back()));
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

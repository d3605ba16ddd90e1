// What decoder_step.cpp makes of the tensors of each layer.
#pragma once

#include <deque>

#include "decoder_layers.h"

namespace aigc_fast {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::optional<Tensors>;

// What a layer has beside its two norms and four products.
struct LayerOptions {
  MaybeTensors qkv_biases, query_key_norms, post_norms, routers;
  std::vector<int64_t> rotations, windows;
};

// The numbers of small tensors, in float32.
class Floats {
 public:
  explicit Floats(ScalarType dtype) : dtype_(dtype) {}
  ScalarType dtype() const { return dtype_; }
  const float* of(const Tensor& x, int64_t size, const char* name) {
    require(x.dim() == 1 && x.size(0) == size && x.is_contiguous() && x.scalar_type() == dtype_,
            name, " must have shape (", size, ",) and the dtype of hidden");
    return dtype_ == ScalarType::Float ? data<float>(x) : converted_.emplace_back(copy(x)).data();
  }
  static std::vector<float> copy(const Tensor& x) {
    std::vector<float> out(x.numel());
    dispatch(x, "hidden", [&]<class T>(T) {
      if constexpr (!std::is_same_v<T, double>) convert(data<T>(x), out.size(), out.data());
    });
    return out;
  }

 private:
  ScalarType dtype_;
  std::deque<std::vector<float>> converted_;
};

// Makes the layers of what a call was given.
struct LayerReader {
  const Tensors &weights, &caches, &cos, &sin;
  const LayerOptions& options;
  const std::vector<float>& scales;
  const std::vector<int64_t>& positions;
  const DecoderSizes& s;
  bool pre_norms, joint_norms;
  Floats floats;
  std::deque<KeyShares> shares = {};

  const float* norm(const Tensor& t) { return floats.of(t, s.hidden, "a norm"); }
  // The norm of query or key, of one head or of all.
  const float* norm_of_heads(size_t i, int64_t heads) {
    if (!options.query_key_norms) return nullptr;
    const int64_t size = (joint_norms ? heads : 1) * s.head_dim;
    return floats.of((*options.query_key_norms)[i], size, "query_key_norms");
  }
  const Tensor* router(const Tensor& x) {
    require(x.dim() == 2 && x.size(0) == s.experts && x.size(1) == s.hidden && x.is_contiguous() &&
                x.scalar_type() == floats.dtype(),
            "routers must have shape (", s.experts, ", ", s.hidden, ") and the dtype of hidden");
    return &x;
  }
  // The shares of a layer's keys; layers that see as many have the same.
  const KeyShares* shares_of(int64_t window) {
    require(window >= 0, "windows must not be negative, got ", window);
    window = window == 0 ? AttentionShape{}.window : window;
    for (const KeyShares& found : shares)
      if (found.window == window) return &found;
    return &shares.emplace_back(s, positions, window);
  }

  template <class T>
  DecoderLayer<T> read(size_t l) {
    const auto& [qkv_biases, query_key_norms, post_norms, routers, rotations, windows] = options;
    const Tensor* w = &weights[(pre_norms ? 6 : 4) * l];
    const int64_t rotation = rotations.empty() ? 0 : rotations[l];
    require(rotation >= -1 && rotation < static_cast<int64_t>(cos.size()),
            "rotations must be in [-1, ", cos.size(), "), got ", rotation);
    DecoderLayer<T> layer{
        .qkv = DecoderWeight(w[pre_norms]),
        .output = DecoderWeight(w[pre_norms + 1]),
        .gate_up = DecoderWeight(w[2 * pre_norms + 2], s.experts),
        .down = DecoderWeight(w[2 * pre_norms + 3], s.experts),
        .router = routers ? router((*routers)[l]) : nullptr,
        .keys = mutable_data<T>(caches[2 * l]),
        .values = mutable_data<T>(caches[2 * l + 1]),
        .key_scale = scales.data() + 2 * l * s.kv_heads,
        .value_scale = scales.data() + (2 * l + 1) * s.kv_heads,
        .shares = shares_of(windows.empty() ? 0 : windows[l]),
        .attention_norm = pre_norms ? norm(w[0]) : nullptr,
        .post_attention_norm = post_norms ? norm((*post_norms)[2 * l]) : nullptr,
        .mlp_norm = pre_norms ? norm(w[3]) : nullptr,
        .post_mlp_norm = post_norms ? norm((*post_norms)[2 * l + 1]) : nullptr,
        .query_norm = norm_of_heads(2 * l, s.heads),
        .key_norm = norm_of_heads(2 * l + 1, s.kv_heads),
        .qkv_bias = qkv_biases ? floats.of((*qkv_biases)[l], s.packed(), "qkv_biases") : nullptr,
        .cos = rotation < 0 ? nullptr : data<float>(cos[rotation]),
        .sin = rotation < 0 ? nullptr : data<float>(sin[rotation]),
    };
    require(layer.qkv.fits(s.packed(), s.hidden) &&
                layer.output.fits(s.hidden, s.heads * s.head_dim) && s.inner % kTileRows == 0 &&
                layer.gate_up.fits(2 * s.inner, s.hidden) && layer.down.fits(s.hidden, s.inner),
            "the weights of layer ", l, " do not fit together");
    return layer;
  }
};

}  // namespace aigc_fast

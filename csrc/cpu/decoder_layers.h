// What decoder_step is given: sizes, numbers, packed weights, layers; and the shares of its
// attention.
#pragma once

#include "attention_shape.h"
#include "quantized.h"
#include "sums.h"

namespace aigc_fast {

constexpr int64_t kWeightGroup = 32;  // of all the weights
constexpr int64_t kKeysOfItem = 64;   // keys of an item of attention

struct DecoderWeight {
  QuantizedFormat format;
  const uint8_t* blocks;
  int64_t tiles;    // of one expert, where there are such: one after another
  int64_t experts;  // 0 where all tokens meet the same weight

  explicit DecoderWeight(const Tensor& x, int64_t experts = 0)
      : format(format_with_groups_of_32(x)), experts(experts) {
    require(x.is_contiguous(), "weights must be contiguous");
    blocks = data<uint8_t>(x);
    tiles = x.size(0) / std::max<int64_t>(experts, 1);
    require(experts == 0 || tiles * experts == x.size(0), "experts must have as many tiles each");
  }
  int64_t rows() const { return tiles * kTileRows; }
  bool fits(int64_t rows, int64_t columns) const {
    return format.columns() == columns && this->rows() - rows >= 0 &&
           this->rows() - rows < kTileRows;
  }

 private:
  static QuantizedFormat format_with_groups_of_32(const Tensor& x) {
    require(x.dim() == 3, "a quantised weight must have 3 dimensions");
    const int bits = x.size(2) < kTileRows * kWeightGroup ? 4 : 8;
    return format_of(x, bits, kWeightGroup, x.size(0) * kTileRows);
  }
};

struct DecoderSizes {
  int64_t batch, hidden, heads, kv_heads, head_dim, inner, capacity, key_batch, key_seq, key_head;
  int64_t turning;             // the leading features of a head that a rotation turns
  int64_t experts, per_token;  // of a layer, and those that a token is sent to; 0 without any
  Pages pages;
  int64_t group() const { return heads / kv_heads; }
  // The rows that the down projection multiplies.
  int64_t inner_rows() const { return batch * std::max<int64_t>(per_token, 1); }
  int64_t packed() const { return (heads + 2 * kv_heads) * head_dim; }
  // Where entry `index` of a sequence lies in a cache.
  int64_t entry(int64_t b, int64_t index) const {
    if (!pages.table) return b * key_batch + index * key_seq;
    return pages.at(b, index / pages.size) * key_batch + index % pages.size * key_seq;
  }
};

// The same in all layers.
struct DecoderNumbers {
  float eps, scale, softcap, residual_scale;
  bool as_codes;     // activations, in every product
  bool gelu;         // in its tanh form, in place of silu
  bool joint_norms;  // the norm of query is over all its heads, and so is that of key
  bool normalize_experts;
};

// A share of the keys of one key/value head of one sequence, which has `splits` of them.
struct KeyShare {
  int64_t b, head, begin, end, splits;
};

// Those of all sequences in a layer that sees the `window` newest keys.
struct KeyShares {
  int64_t window;
  std::vector<KeyShare> units;
  bool split = false;  // whether some head has several

  KeyShares(const DecoderSizes& s, const std::vector<int64_t>& positions, int64_t window)
      : window(window) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t end = positions[b] + 1, oldest = std::max<int64_t>(0, end - window);
      const int64_t first = oldest / kKeysOfItem, splits = positions[b] / kKeysOfItem + 1 - first;
      for (int64_t h = 0; h < s.kv_heads; ++h)
        for (int64_t i = first; i < first + splits; ++i)
          units.push_back({b, h, std::max(oldest, i * kKeysOfItem),
                           std::min(end, (i + 1) * kKeysOfItem), splits});
      split = split || splits > 1;
    }
  }
};

// T is the type of the caches; their numbers of each head are to be multiplied by its scale.
template <class T>
struct DecoderLayer {
  DecoderWeight qkv, output, gate_up, down;
  const Tensor* router;  // (experts, hidden), or nullptr
  T *keys, *values;
  const float *key_scale, *value_scale;
  const KeyShares* shares;
  // nullptr where the layer has none: the norms' weights, the bias, the angles of each position.
  const float *attention_norm, *post_attention_norm, *mlp_norm, *post_mlp_norm;
  const float *query_norm, *key_norm, *qkv_bias;
  const float *cos, *sin;
};

// 1 / rms(x)
inline float rms_factor(const float* x, int64_t width, float eps) {
  const float squares = sums_over<float, 1>(width, [&](int64_t i, auto n, Vec<float>* sum) {
    const Vec<float> v = load(x + i, n);
    sum[0] += v * v;
  })[0];
  return 1 / std::sqrt(squares / width + eps);
}

// out = x * factor * weight
inline void scale_row(const float* x, int64_t width, float factor, const float* weight,
                      float* out) {
  for_vectors<float>(width, [&](int64_t i, auto n) {
    store(out + i, load(x + i, n) * factor * load(weight + i, n), n);
  });
}

}  // namespace aigc_fast

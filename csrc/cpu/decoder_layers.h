// What decoder_step is given: sizes, packed weights, layers.
#pragma once

#include "attention_shape.h"
#include "quantized.h"

namespace aigc_fast {

constexpr int kLayerTensors = 6;      // attention norm, qkv, output, MLP norm, gate and up, down
constexpr int kLayerStages = 7;       // of a layer
constexpr int64_t kWeightGroup = 32;  // of all the weights

struct DecoderWeight {
  QuantizedFormat format;
  const uint8_t* blocks;
  int64_t tiles;

  explicit DecoderWeight(const Tensor& x) : format(format_with_groups_of_32(x)) {
    require(x.is_contiguous(), "weights must be contiguous");
    blocks = data<uint8_t>(x);
    tiles = x.size(0);
  }
  int64_t rows() const { return tiles * kTileRows; }

 private:
  static QuantizedFormat format_with_groups_of_32(const Tensor& x) {
    require(x.dim() == 3, "a quantised weight must have 3 dimensions");
    const int bits = x.size(2) < kTileRows * kWeightGroup ? 4 : 8;
    return format_of(x, bits, kWeightGroup, x.size(0) * kTileRows);
  }
};

// T is the type of the caches; their numbers of each head are to be multiplied by its scale.
template <class T>
struct DecoderLayer {
  const float* attention_norm;
  DecoderWeight qkv, output;
  const float* mlp_norm;
  DecoderWeight gate_up, down;
  T *keys, *values;
  const float *key_scale, *value_scale;
};

// A share of the keys of one key/value head of one sequence.
struct KeyShare {
  int64_t b, head, split, splits;
};

struct DecoderSizes {
  int64_t batch, hidden, heads, kv_heads, head_dim, inner, capacity, key_batch, key_seq, key_head;
  Pages pages;
  int64_t group() const { return heads / kv_heads; }
  int64_t packed() const { return (heads + 2 * kv_heads) * head_dim; }
  // Where entry `index` of a sequence lies in a cache.
  int64_t entry(int64_t b, int64_t index) const {
    if (!pages.table) return b * key_batch + index * key_seq;
    return pages.at(b, index / pages.size) * key_batch + index % pages.size * key_seq;
  }
};

}  // namespace aigc_fast

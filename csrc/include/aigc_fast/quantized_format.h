// How weights of 4- or 8-bit codes lie, and what products with them take.
//
// A weight (out_features, in_features) lies in tiles of 16 rows. A tile is a sequence of blocks,
// one a group of columns: the codes of the 16 rows, then their 16 scales, then (asymmetric
// weights) their 16 minimums, both fp16. So a tile is one stream of bytes, and a vector of int32
// lanes is 16 rows. Four columns of a row lie in one lane; 64 bytes of 4-bit codes hold the columns
// 0..3 of a run of 8 in their low nibbles and 4..7 in their high ones.
#pragma once

#include <aigc_fast/torch.h>

namespace aigc_fast {

constexpr int64_t kTileRows = 16;

struct QuantizedFormat {
  int64_t bits, groups, group_size;
  bool has_minimum;

  int64_t columns() const { return groups * group_size; }
  int64_t code_bytes() const { return kTileRows * group_size * bits / 8; }
  int64_t block_bytes() const { return code_bytes() + (has_minimum ? 4 : 2) * kTileRows; }
  int64_t tile_bytes() const { return groups * block_bytes(); }
  // The code of zero; where there is a minimum codes count from it.
  int zero() const { return has_minimum ? 0 : 1 << (bits - 1); }
};

// The format of a weight tensor (tiles, groups, bytes).
inline QuantizedFormat format_of(const Tensor& weight, int64_t bits, int64_t group_size,
                                 int64_t out_features) {
  require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  require(weight.dim() == 3 && weight.scalar_type() == ScalarType::Byte && weight.size(1) > 0,
          "weight must be uint8 of 3 dimensions and have groups");
  const int64_t run = 32 / bits;
  require(group_size > 0 && group_size % run == 0 && group_size <= 65536,
          "group_size must be a multiple of ", run, " up to 65536, got ", group_size);
  QuantizedFormat f{bits, weight.size(1), group_size, true};
  f.has_minimum = weight.size(2) == f.block_bytes();
  require(weight.size(2) == f.block_bytes(), "weight must have ", f.block_bytes(), " or ",
          f.block_bytes() + 2 * kTileRows, " bytes a block, got ", weight.size(2));
  require(out_features > 0 && weight.size(0) == (out_features + kTileRows - 1) / kTileRows,
          "weight must have out_features / 16 tiles");
  return f;
}

// Refuses what quantized_linear cannot multiply such a weight with, or add.
inline void check_operands(const QuantizedFormat& f, const Tensor& x, const MaybeTensor& bias,
                           int64_t out_features) {
  require(x.dim() > 0, "x must have at least 1 dimension");
  // A run of columns is padded, and within a single group alone.
  const int64_t in_features = x.size(-1), padding = f.groups == 1 ? 32 / f.bits - 1 : 0;
  require(in_features >= f.columns() - padding && in_features <= f.columns(),
          "x must have in_features of weight, at most ", f.columns(), ", got ", in_features);
  require(!bias || (bias->dim() == 1 && bias->size(0) == out_features &&
                    bias->scalar_type() == x.scalar_type()),
          "bias must have shape (", out_features, ",) and the dtype of x");
}

}  // namespace aigc_fast

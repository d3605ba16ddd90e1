// What the kernel of quantized_linear.cuh multiplies, and how it comes to shared memory.
#pragma once

#include "device.cuh"

namespace aigc_fast {

enum class Element : int { kFloat, kBFloat16, kHalf };

struct QuantizedGemv {
  const char* weight;
  const char* x;          // the 8 columns of a lane side by side, as ArrangeRows leaves them
  const float* x_scales;  // (groups, 8), of int8 x
  const void* bias;       // or null
  void* out;              // (rows, out_features)
  int64_t tile_bytes, x_row_bytes;
  int rows, out_features, tiles, x_pieces;  // 16-byte pieces of a row of x
  int groups, group_runs, group_steps, block_bytes;
  bool has_minimum;
  Element type;  // of bias and out
};

constexpr int kGemvWarps = 8, kMaxGemvRows = 8, kGemvTiles = 2;
constexpr int kSharedBytes = 99 * 1024;  // that a block may have, on the smallest GPU since sm_80

// Everything is copied and kept in pieces of 16 bytes.
template <class X, int BITS>
struct GemvShape {
  static constexpr bool kIntegers = sizeof(X) == 1;
  static constexpr int kCodes = BITS / 4;  // of codes, a lane and step
  static constexpr int kSteps = kCodes == 1 || kIntegers ? 2 : 1;
  static constexpr int kXPieces = sizeof(X) == 4 ? 2 : 1;  // of x side by side, a lane ...
  static constexpr int kXSteps = kIntegers ? 2 : 1;        // ... for so many steps
  static constexpr int kX = kSteps * kXPieces / kXSteps;   // of x, a lane and stage
  // Where the parts of a stage begin. A step has 8 pieces of scales and minimums, 2 of x's scales.
  static constexpr int kScales = kSteps * kCodes * 32;
  static constexpr int kXScales = kScales + kSteps * 8;
  static constexpr int kXBegin = kXScales + (kIntegers ? kSteps * 2 : 0);
  static __host__ __device__ constexpr int stage(int rows) { return kXBegin + kX * 4 * rows; }
  static constexpr int kFit = kSharedBytes / (kGemvWarps * stage(kMaxGemvRows) * 16);
  static constexpr int kStages = kFit < 5 ? kFit : 5;
  static constexpr int shared(int rows) { return kGemvWarps * kStages * stage(rows) * 16; }
};

// ---- copies -----------------------------------------------------------------------------------

// Copies the stages of a warp, one after the other.
template <class X, int BITS>
class GemvCopies {
  using S = GemvShape<X, BITS>;

 public:
  __device__ GemvCopies(const QuantizedGemv& p, int warp, int lane) : p_(p), lane_(lane) {
    const int tile = blockIdx.x * kGemvTiles + lane / 16;
    has_tile_ = tile < p.tiles;
    weight_ = p.weight + (has_tile_ ? tile : 0) * p.tile_bytes + lane / 4 % 4 * 16;
    x_ = p.x + (lane < 4 * p.rows ? lane / 4 : 0) * p.x_row_bytes;
    constexpr int kOfOthers = (kGemvWarps - 1) * S::kSteps;
    step_ = warp * S::kSteps;
    group_ = step_ / p.group_steps;
    in_group_ = step_ % p.group_steps;
    skip_groups_ = kOfOthers / p.group_steps;
    skip_steps_ = kOfOthers % p.group_steps;
  }

  __device__ void next(uint4* stage) {
    if (group_ >= p_.groups) return;
    const int t = lane_ % 4, quad = lane_ / 4 % 4;
#pragma unroll
    for (int i = 0; i < S::kX; ++i) {
      const int step = step_ / S::kXSteps + i / S::kXPieces;
      const int piece = (step * 4 + t) * S::kXPieces + i % S::kXPieces;
      const bool valid = piece < p_.x_pieces;
      if (lane_ < 4 * p_.rows)
        copy_async(stage + S::kXBegin + i * 4 * p_.rows + lane_,
                   x_ + (valid ? piece : 0) * int64_t{16}, valid);
    }
#pragma unroll
    for (int j = 0; j < S::kSteps; ++j) {
      const bool has_step = group_ < p_.groups;
      const char* block = weight_ + (has_step ? group_ : 0) * int64_t{p_.block_bytes};
#pragma unroll
      for (int c = 0; c < S::kCodes; ++c) {
        const int run = (in_group_ * 4 + t) * S::kCodes + c;
        const bool valid = has_step && has_tile_ && run < p_.group_runs;
        copy_async(stage + (j * S::kCodes + c) * 32 + lane_, block + (valid ? run * 64 : 0), valid);
      }
      if (t == j) {  // the scales of a tile are two pieces, and so are its minimums
        const bool valid = has_step && has_tile_ && (quad < 2 || p_.has_minimum);
        copy_async(stage + S::kScales + j * 8 + lane_ / 4, block + (valid ? p_.group_runs * 64 : 0),
                   valid);
      }
      if (S::kIntegers && t == (j + 1) % 4 && lane_ < 8)
        copy_async(stage + S::kXScales + j * 2 + lane_ / 4,
                   p_.x_scales + (has_step ? group_ : 0) * 8 + lane_ / 4 * 4, has_step);
      advance(0, 1);
    }
    step_ += kGemvWarps * S::kSteps;
    advance(skip_groups_, skip_steps_);
  }

 private:
  __device__ void advance(int groups, int steps) {
    in_group_ += steps;
    group_ += groups;
    if (in_group_ < p_.group_steps) return;
    in_group_ -= p_.group_steps;
    ++group_;
  }

  const QuantizedGemv& p_;
  const char *weight_, *x_;
  bool has_tile_;
  int lane_, step_, group_, in_group_, skip_groups_, skip_steps_;
};

}  // namespace aigc_fast

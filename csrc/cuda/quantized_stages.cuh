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
  static constexpr int kStage = kXBegin + kX * 32;
  static constexpr int kFit = kSharedBytes / (kGemvWarps * kStage * 16);
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  static constexpr int kShared = kGemvWarps * kStages * kStage * 16;  // bytes
};

// Copies the stages of a warp, one after the other. What there is not becomes zeros: a second tile,
// rows of x from p.rows on, columns past the end of a group.
template <class X, int BITS>
class GemvCopies {
  using S = GemvShape<X, BITS>;
  static constexpr int kRuns = 4 * S::kCodes;           // of a step
  static constexpr int kXStep = 4 * S::kXPieces;        // pieces of a row, in kXSteps steps
  static constexpr int kTurn = kGemvWarps * S::kSteps;  // steps from a stage to the warp's next

 public:
  __device__ GemvCopies(const QuantizedGemv& p, int warp, int lane) : p_(p), lane_(lane) {
    const int t = lane % 4, quad = lane / 4 % 4, row = lane / 4, first = warp * S::kSteps;
    const int tile = blockIdx.x * kGemvTiles + lane / 16, group = first / p.group_steps;
    const int skipped = kTurn - S::kSteps;
    steps_ = p.groups * p.group_steps - first;
    span_ = p.group_steps * kRuns;
    run_ = first % p.group_steps * kRuns + t * S::kCodes;
    runs_ = tile < p.tiles ? p.group_runs : 0;
    skip_runs_ = skipped % p.group_steps * kRuns;
    skip_bytes_ = int64_t{skipped / p.group_steps} * p.block_bytes;
    block_ = p.weight + tile * p.tile_bytes + int64_t{group} * p.block_bytes + quad * 16;
    has_scales_ = tile < p.tiles && (quad < 2 || p.has_minimum);
    const int begin = first / S::kXSteps * kXStep + t * S::kXPieces;
    x_ = p.x + row * p.x_row_bytes + int64_t{begin} * 16;
    x_pieces_ = row < p.rows ? p.x_pieces - begin : 0;
    if (S::kIntegers) x_scales_ = p.x_scales + group * 8 + lane / 4 * 4;
  }

  __device__ void next(uint4* stage) {
    if (steps_ <= 0) return;
#pragma unroll
    for (int i = 0; i < S::kX; ++i) {
      const int piece = i / S::kXPieces * kXStep + i % S::kXPieces;
      copy_async(stage + S::kXBegin + i * 32 + lane_, x_ + piece * 16, piece < x_pieces_);
    }
#pragma unroll
    for (int j = 0; j < S::kSteps; ++j) {
      const bool has_step = j < steps_;
#pragma unroll
      for (int c = 0; c < S::kCodes; ++c)
        copy_async(stage + (j * S::kCodes + c) * 32 + lane_, block_ + (run_ + c) * int64_t{64},
                   has_step && run_ + c < runs_);
      if (lane_ % 4 == j)  // the scales of a tile are two pieces, and so are its minimums
        copy_async(stage + S::kScales + j * 8 + lane_ / 4, block_ + p_.group_runs * int64_t{64},
                   has_step && has_scales_);
      if (S::kIntegers && lane_ < 8 && lane_ % 4 == (j + 1) % 4)
        copy_async(stage + S::kXScales + j * 2 + lane_ / 4, x_scales_, has_step);
      advance(kRuns);
    }
    x_ += kTurn / S::kXSteps * kXStep * 16;
    x_pieces_ -= kTurn / S::kXSteps * kXStep;
    steps_ -= kTurn;
    block_ += skip_bytes_;
    if (S::kIntegers) x_scales_ += (kTurn - S::kSteps) / p_.group_steps * 8;
    advance(skip_runs_);
  }

 private:
  __device__ void advance(int runs) {
    run_ += runs;
    if (run_ < span_) return;
    run_ -= span_;
    block_ += p_.block_bytes;
    if (S::kIntegers) x_scales_ += 8;
  }

  const QuantizedGemv& p_;
  int lane_, steps_, x_pieces_;        // from here on
  int run_, runs_, span_, skip_runs_;  // this lane's run, those of a group, with padding
  int64_t skip_bytes_;                 // the blocks of other warps' stages
  const char *block_, *x_;
  const float* x_scales_ = nullptr;
  bool has_scales_;
};

}  // namespace aigc_fast

// The gradient of the weight of a 4x4 convolution with stride 2 and a border of one zero, in bf16
// by the instruction that adds two products at once:
//
//   dw[o][ky][kx][c] = sum over images, y and x of grad[y][x][o] * x[2 y + ky - 1][2 x + kx - 1][c]
//
// Of two neighbouring outputs of a row. Taps (ky, kx) and (ky + 2, kx) read every second row and
// column of x, the second tap a row later: paired once, in the order of the outputs, that plane
// serves both, and each is one product of matrices, over the outputs of all images.
#include "conv_inputs.h"
#include "conv_sums.h"

namespace aigc_fast {
namespace {

#if AIGC_BF16_DOT
class Conv4x4Weight {
 public:
  // Of x and the gradient of y, both with their channels innermost and multiples of kLanes.
  Conv4x4Weight(const ConvInput<bf16>& x, const ConvInput<bf16>& grad, const ConvShape& s)
      : x_(x), grad_(grad), s_(s), zeros_(std::max(s.in, s.out)) {}

  // To (out, 4, 4, in), contiguous.
  void run(bf16* to) const {
    KeptBuffer<Bf16Pair> grads(s_.batch * grad_size() + kRows);
    in_parallel(s_.batch * rows_, pairs_ * s_.out * 2, [&](int64_t i) {
      const bf16* row = grad_.data + i / rows_ * grad_.batch_stride + i % rows_ * grad_.row_stride;
      pair_row(row, grad_.pixel_stride, 0, 1, columns_, s_.out, out_pitch_,
               grads.data() + i * pairs_ * out_pitch_);
    });
    // A plane an item; where there are more threads they share its outputs too. What is summed in
    // which order is the same.
    const int64_t splits = std::clamp<int64_t>(torch::stable::get_num_threads() / 4, 1, blocks_);
    torch::stable::parallel_for(0, 8 * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t split = i / 8;
        add_plane(i / 4 % 2, i % 4, blocks_ * split / splits, blocks_ * (split + 1) / splits,
                  grads.data(), to);
      }
    });
  }

 private:
  static constexpr int64_t kGroup = kConvOuts * kLanes<float>, kRows = kConvPixels;
  static constexpr int64_t kBytes = 1 << 18;  // of planes and gradients in the second cache

  // An odd number of lines of memory: neighbouring pairs then lie in different sets of the cache.
  static int64_t pitch_of(int64_t channels) {
    return (channels / kLanes<float> | 1) * kLanes<float>;
  }
  int64_t grad_size() const { return rows_ * pairs_ * out_pitch_; }
  int64_t plane_size() const { return (rows_ + 1) * pairs_ * in_pitch_; }

  // The pairs of pixels first, first + step, ... of a row of `width` pixels, zero beyond it; null
  // stands for a row of zeros.
  void pair_row(const bf16* row, int64_t stride, int64_t first, int64_t step, int64_t width,
                int64_t channels, int64_t pitch, Bf16Pair* to) const {
    const auto pixel = [&](int64_t at) {
      return row && at >= 0 && at < width ? row + at * stride : zeros_.data();
    };
    for (int64_t i = 0; i < pairs_; ++i, first += 2 * step, to += pitch)
      pair_steps(pixel(first), pixel(first + step), channels, to);
  }

  // The taps (ky, kx) and (ky + 2, kx) of some blocks of outputs.
  void add_plane(int64_t ky, int64_t kx, int64_t begin, int64_t end, const Bf16Pair* grads,
                 bf16* to) const {
    const int64_t image = (plane_size() + grad_size()) * sizeof(Bf16Pair);
    const int64_t some = std::clamp<int64_t>(kBytes / image, 1, s_.batch);
    KeptBuffer<Bf16Pair> planes(some * plane_size() + kGroup);
    KeptBuffer<ConvSums<float>> sums(groups_ * (end - begin) * 2);
    for (int64_t n = 0; n < s_.batch; n += some) {
      const int64_t count = std::min(some, s_.batch - n);
      for (int64_t i = 0; i < count * (rows_ + 1); ++i) {
        const int64_t y = 2 * (i % (rows_ + 1)) + ky - 1;
        const bf16* row = x_.data + (n + i / (rows_ + 1)) * x_.batch_stride + y * x_.row_stride;
        pair_row(y >= 0 && y < s_.height ? row : nullptr, x_.pixel_stride, kx - 1, 2, s_.width,
                 s_.in, in_pitch_, planes.data() + i * pairs_ * in_pitch_);
      }
      ConvSums<float>* total = sums.data();
      for (int64_t c = 0; c < s_.in; c += kGroup)
        for (int64_t b = begin; b < end; ++b)
          for (int64_t later = 0; later < 2; ++later, ++total)
            for (int64_t i = 0; i < count; ++i)
              add_block(s_.out - b * kRows, s_.in - c, grads + (n + i) * grad_size() + b * kRows,
                        planes.data() + i * plane_size() + later * pairs_ * in_pitch_ + c,
                        n + i > 0, *total);
    }
    const ConvSums<float>* total = sums.data();
    for (int64_t c = 0; c < s_.in; c += kGroup)
      for (int64_t b = begin; b < end; ++b)
        for (int64_t later = 0; later < 2; ++later, ++total)
          for (int64_t p = 0; p < std::min(kRows, s_.out - b * kRows); ++p)
            for (int64_t v = 0; v < kConvOuts && c + v * kLanes<float> < s_.in; ++v)
              store(to + (((b * kRows + p) * 4 + ky + 2 * later) * 4 + kx) * s_.in + c +
                        v * kLanes<float>,
                    total->of[p][v]);
  }

  // The sums of an image's outputs.
  void add_block(int64_t rows_left, int64_t lanes_left, const Bf16Pair* rows, const Bf16Pair* lanes,
                 bool add, ConvSums<float>& total) const {
    const auto products = [&]<int P>(std::integral_constant<int, P>) {
      const auto all =
          lanes_left > kLanes<float> ? add_outer_products<P, 2> : add_outer_products<P, 1>;
      // A pair is two steps.
      all(rows, out_pitch_ / 2, lanes, in_pitch_ / 2, rows_ * pairs_ * 2, add, total);
    };
    if (rows_left > kRows * 2 / 3) return products(std::integral_constant<int, kRows>{});
    if (rows_left > kRows / 3) return products(std::integral_constant<int, kRows * 2 / 3>{});
    products(std::integral_constant<int, kRows / 3>{});
  }

  const ConvInput<bf16> x_, grad_;
  const ConvShape s_;
  const std::vector<bf16> zeros_;
  const int64_t rows_ = s_.height / 2, columns_ = s_.width / 2, pairs_ = (columns_ + 1) / 2;
  const int64_t in_pitch_ = pitch_of(s_.in), out_pitch_ = pitch_of(s_.out);
  const int64_t groups_ = (s_.in + kGroup - 1) / kGroup, blocks_ = (s_.out + kRows - 1) / kRows;
};
#endif

Tensor conv4x4_backward_taps(const Tensor& grad_in, const Tensor& x_in) {
  require(grad_in.dim() == 4 && x_in.dim() == 4, "grad and x must have 4 dimensions");
  const ConvShape s{x_in.size(0), x_in.size(2), x_in.size(3), x_in.size(1), grad_in.size(1)};
  require(s.height % 2 == 0 && s.width % 2 == 0 && grad_in.size(0) == s.batch &&
              2 * grad_in.size(2) == s.height && 2 * grad_in.size(3) == s.width,
          "grad must have the sizes of the output");
  require(s.in % 16 == 0 && s.out % 16 == 0, "channels must be multiples of 16");
  require(grad_in.numel() > 0 && x_in.numel() > 0, "grad and x must not be empty");
  require(
      x_in.scalar_type() == ScalarType::BFloat16 && grad_in.scalar_type() == ScalarType::BFloat16,
      "grad and x must be bfloat16");
#if AIGC_BF16_DOT
  if (has_bf16_dot()) {
    const Tensor x = channels_innermost<bf16>(x_in), grad = channels_innermost<bf16>(grad_in);
    const Tensor weight = empty({s.out, 4, 4, s.in}, ScalarType::BFloat16);
    Conv4x4Weight(input_of<bf16>(x), input_of<bf16>(grad), s).run(mutable_data<bf16>(weight));
    return weight;
  }
#endif
  require(false, "the processor must have AVX512-BF16");
  return {};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("conv4x4_backward_taps", TORCH_BOX(&conv4x4_backward_taps));
}

}  // namespace
}  // namespace aigc_fast

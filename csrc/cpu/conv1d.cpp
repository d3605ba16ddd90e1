// Convolutions along time, channels innermost: y = gain * (conv(leaky_relu(x)) + bias + residuals),
// and the transposed convolution, whose every stride-th output is a convolution of its own. Each is
// the gradient of the other, times the derivative of a leaky ReLU of `gate`.
#include <limits>
#include <numeric>

#include "conv_products.h"
#include "conv_sequences.h"
#include "memory_order.h"

namespace aigc_fast {
namespace {

// Outputs first, first + apart, ... of a sequence: a convolution whose tap j, of the i-th of them,
// reads input i * stride + begin + j * step.
template <class T>
struct Phase {
  ConvWeight<T> weight;
  int64_t taps, begin, step, first;

  int64_t end() const { return begin + (taps - 1) * step; }  // where the last tap reads
};

struct Sequences {
  int64_t batch, in, time, out, length;  // length: outputs of a sequence
  int64_t apart, stride;                 // outputs of a phase are apart, their inputs a stride
};

template <class Products, class T>
void convolve(const SequenceInput<T>& x, const Sequences& s, const std::vector<Phase<T>>& phases,
              const ConvFinish<T>& finish, const ConvTarget<T>& y) {
  using S = typename Products::S;
  std::vector<Products> products;
  int64_t begin = std::numeric_limits<int64_t>::max(), end = -begin, work = 0;
  for (const Phase<T>& phase : phases) {
    products.emplace_back(phase.weight, ConvSize{s.in, s.out, phase.taps});
    if (phase.taps > 0) begin = std::min(begin, phase.begin), end = std::max(end, phase.end());
    work += phase.taps * s.in * s.out;
  }
  if (begin > end) begin = end = 0;  // no phase has a tap
  // The inputs of a tile stay in the second cache; enough tiles keep all threads busy.
  constexpr int64_t kTileBytes = 1 << 17, kTiles = 16;
  const int64_t depth = Products::depth(s.in), steps = (s.length + s.apart - 1) / s.apart;
  const int64_t most = std::max<int64_t>(48, kTileBytes / (depth * s.stride * sizeof(S)));
  const int64_t tile = std::clamp<int64_t>(round_up(steps / kTiles, 48), 48, most);
  const int64_t tiles = (steps + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, tile * work));
  torch::stable::parallel_for(0, s.batch * tiles, grain, [&](int64_t from, int64_t to) {
    std::vector<S> scratch((Products::pixels(tile) * s.stride + end - begin) * depth);
    std::vector<const S*> taps;
    [[maybe_unused]] const typename Products::Session session;
    for (int64_t index = from; index < to; ++index) {
      const int64_t n = index / tiles, t = index % tiles * tile;
      const int64_t width = std::min(tile, steps - t);
      // Steps [first, last) of the input, with zeros where there are none.
      const int64_t first = t * s.stride + begin, last = (t + width - 1) * s.stride + end + 1;
      const int64_t some = std::clamp<int64_t>(first, 0, s.time);
      const int64_t none = std::clamp<int64_t>(last, some, s.time);
      const auto clear = [&](int64_t a, int64_t b) {
        if (a < b)
          std::memset(static_cast<void*>(scratch.data() + (a - first) * depth), 0,
                      (b - a) * depth * sizeof(S));
      };
      clear(first, std::min(some, last));
      x.read(n, some, none - some, s.in, scratch.data() + (some - first) * depth, depth);
      clear(std::max(none, first), last);
      for (size_t p = 0; p < phases.size(); ++p) {
        const Phase<T>& phase = phases[p];
        taps.clear();
        for (int64_t tap = 0; tap < phase.taps; ++tap)
          taps.push_back(scratch.data() + (phase.begin + tap * phase.step - begin) * depth);
        const int64_t count = std::min(width, (s.length - phase.first - 1) / s.apart + 1 - t);
        ConvTarget<T> target = y.at(n * s.length + t * s.apart + phase.first);
        target.pitch *= s.apart;
        products[p].run(taps.data(), s.stride * depth, count, target, finish);
      }
    }
  });
}

template <class T>
void run(const Tensor& x, const Sequences& s, const std::vector<Phase<T>>& phases,
         const MaybeTensor& bias, const std::vector<Tensor>& residuals, double slope, double gain,
         const MaybeTensor& gate, double gate_slope, const Tensor& y) {
  using A = Acc<T>;
  const std::vector<A> biases = padded_channels<T>(bias, "bias", s.out, 0);
  const std::vector<A> slopes = padded_channels<T>({}, "slope", s.out, 1);
  const ConvFinish<T> finish{biases.data(), slopes.data(), 1, A(gain), s.out, A(gate_slope)};
  ConvTarget<T> target{mutable_data<T>(y), s.out};
  for (size_t i = 0; i < residuals.size(); ++i) target.residuals[i] = data<T>(residuals[i]);
  if (gate) target.gate = data<T>(*gate);
  with_products<T>(s.out, [&]<class Products>(std::type_identity<Products>) {
    convolve<Products>(sequence_of<T>(x, slope), s, phases, finish, target);
  });
}

Tensor as_result(const Tensor& given, const Tensor& y, const char* name) {
  check_like(given, y, name, "the result");
  return in_order_of(given, y);
}

void check_input(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t stride,
                 int64_t padding, int64_t dilation) {
  require(x.dim() == 3, "x must have 3 dimensions");
  require(weight.dim() == 3, "weight must have 3 dimensions");
  require(x.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
  require(!bias || bias->scalar_type() == weight.scalar_type(), "bias must have the dtype of x");
  require(weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) > 0,
          "weight must have outputs, inputs and taps");
  require(padding >= 0 && padding < (1 << 30), "padding must not be negative");
  require(dilation >= 1 && dilation < (1 << 30) / weight.size(2), "dilation must be positive");
  require(stride >= 1 && stride < (1 << 20), "stride must be positive");
}

Tensor conv1d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
              const std::vector<Tensor>& residuals_in, int64_t stride, int64_t padding,
              int64_t dilation, double slope, double gain, const MaybeTensor& gate_in,
              double gate_slope) {
  check_input(x, weight, bias, stride, padding, dilation);
  const int64_t taps = weight.size(2);
  require(x.size(1) == weight.size(1), "weight must have the channels of x, ", x.size(1));
  const int64_t beyond_first = x.size(2) + 2 * padding - dilation * (taps - 1) - 1;
  require(x.size(2) > 0 && beyond_first >= 0, "x must be as long as the filter");
  const int64_t length = beyond_first / stride + 1;
  const Sequences s{x.size(0), x.size(1), x.size(2), weight.size(0), length, 1, stride};
  Tensor y = empty_in_order({s.batch, s.out, s.length}, x.scalar_type(), true);
  require(residuals_in.size() <= kConvResiduals, "residuals must be at most 3");
  std::vector<Tensor> residuals;
  for (const Tensor& residual : residuals_in)
    residuals.push_back(as_result(residual, y, "residuals"));
  MaybeTensor gate;
  if (gate_in) gate = as_result(*gate_in, y, "gate");
  if (y.numel() == 0) return y;
  dispatch(x, "x", [&]<class T>(T) {
    const ConvWeight<T> w{data<T>(weight), weight.stride(0), weight.stride(1), weight.stride(2)};
    run<T>(x, s, {{w, taps, -padding, dilation, 0}}, bias, residuals, slope, gain, gate, gate_slope,
           y);
  });
  return y;
}

// A contiguous weight (in, out, taps) as (out, taps, in), of which every tap's inputs then lie side
// by side; ConvWeight of either.
template <class T>
ConvWeight<T> inputs_innermost(const Tensor& weight, KeptBuffer<T>& memory) {
  if (!weight.is_contiguous())
    return {data<T>(weight), weight.stride(1), weight.stride(0), weight.stride(2)};
  const int64_t in = weight.size(0), rows = weight.size(1) * weight.size(2);
  memory = KeptBuffer<T>(in * rows);
  constexpr int64_t kRows = 64;
  in_parallel((rows + kRows - 1) / kRows, kRows * in, [&](int64_t block) {
    const int64_t first = block * kRows;
    copy_transposed(data<T>(weight) + first, rows, std::min(kRows, rows - first), in,
                    memory.data() + first * in, in);
  });
  return {memory.data(), weight.size(2) * in, 1, in};
}

// The outputs first, first + stride, ...: the sums over the taps for which first + padding - tap *
// dilation is a multiple of the stride. These are `apart` taps from one another, and their inputs
// `back` steps, the last tap's first.
template <class T>
Phase<T> phase_of(const ConvWeight<T>& w, int64_t taps, int64_t first, int64_t stride,
                  int64_t padding, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation), apart = stride / common;
  int64_t tap = 0;
  while (tap < std::min(apart, taps) && (first + padding - tap * dilation) % stride) ++tap;
  if (tap == std::min(apart, taps)) return {w, 0, 0, 1, first};
  const int64_t count = (taps - tap - 1) / apart + 1, back = dilation / common;
  const int64_t last = tap + (count - 1) * apart;
  return {{w.at(0, 0, last), w.out_stride, w.in_stride, -apart * w.tap_stride},
          count,
          (first + padding - last * dilation) / stride,
          back,
          first};
}

Tensor conv_transpose1d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        int64_t stride, int64_t padding, double slope, int64_t output_padding,
                        int64_t dilation, const MaybeTensor& gate_in, double gate_slope) {
  check_input(x, weight, bias, stride, padding, dilation);
  const int64_t taps = weight.size(2);
  require(x.size(1) == weight.size(0), "weight must have the channels of x, ", x.size(1));
  require(output_padding >= 0 && output_padding < stride,
          "output_padding must be less than stride");
  const int64_t length =
      (x.size(2) - 1) * stride + dilation * (taps - 1) + 1 + output_padding - 2 * padding;
  require(x.size(2) > 0 && length > 0, "x must be longer than the padding");
  const Sequences s{x.size(0), x.size(1), x.size(2), weight.size(1), length, stride, 1};
  Tensor y = empty_in_order({s.batch, s.out, s.length}, x.scalar_type(), true);
  MaybeTensor gate;
  if (gate_in) gate = as_result(*gate_in, y, "gate");
  if (y.numel() == 0) return y;
  dispatch(x, "x", [&]<class T>(T) {
    KeptBuffer<T> memory;
    const ConvWeight<T> w = inputs_innermost(weight, memory);
    std::vector<Phase<T>> phases;
    for (int64_t first = 0; first < std::min(stride, length); ++first)
      phases.push_back(phase_of(w, taps, first, stride, padding, dilation));
    run<T>(x, s, phases, bias, {}, slope, 1, gate, gate_slope, y);
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("conv1d", TORCH_BOX(&conv1d));
  m.impl("conv_transpose1d", TORCH_BOX(&conv_transpose1d));
}

}  // namespace
}  // namespace aigc_fast

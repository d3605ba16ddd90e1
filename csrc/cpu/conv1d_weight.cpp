// The gradient of the weight of a convolution along time, whose output's gradient is `grad`:
//
//   dw[o][c][tap] = sum over t of grad[o][t] * x[c][t * stride - padding + tap * dilation]
//
// of leaky_relu(grad) and leaky_relu(x). That of a transposed convolution is the same with its
// input in the place of grad and the gradient of its output in that of x.
#include "conv_sequences.h"
#include "conv_sums.h"

namespace aigc_fast {
namespace {

struct Places {
  int64_t batch, time, length, taps, stride, padding, dilation;
};

// One of the two tensors; `move` and `shift` say where a step and a tap read it.
template <class T>
struct Side {
  SequenceInput<T> sequence;
  int64_t channels, time, move, shift, padding;

  // Steps [first, last) of memory that steps [begin, end) of the output read, by any tap.
  int64_t first(int64_t begin) const {
    return std::clamp<int64_t>(begin * move - padding, 0, time);
  }
  int64_t last(int64_t end, int64_t taps) const {
    return std::clamp<int64_t>((end - 1) * move - padding + (taps - 1) * shift + 1, 0, time);
  }
};

// Products of matrices, a tap each, whose sums run over time: blocks of kRows channels of one side
// by groups of kGroup of the other. S is what is multiplied: Acc<T>, or Bf16Pair.
template <class T, class S>
class Conv1dWeight {
 public:
  using A = Acc<T>;

  // Outer products are rows by vectors of lanes: where one side has few channels, it has the rows.
  Conv1dWeight(const Side<T>& grad, const Side<T>& x, const Places& places)
      : turned_(round_up(grad.channels, kRows / 3) * round_up(x.channels, kGroup) <
                round_up(x.channels, kRows / 3) * round_up(grad.channels, kGroup)),
        rows_(turned_ ? grad : x),
        lanes_(turned_ ? x : grad),
        s_(places) {}

  // To (out, in, taps), contiguous.
  void run(T* to) const {
    // Items of so much work, whose number is that of neither threads nor processors: the order of
    // sums is one. They share the time, while sums of so many parts stay in the third cache, and
    // where parts are few the groups too, which read all rows each.
    const int64_t steps = steps_at_once(), pieces = (s_.length + steps - 1) / steps;
    const int64_t bytes = groups_ * per_group() * sizeof(A);
    const int64_t work = s_.batch * s_.length * s_.taps * rows_.channels * lanes_.channels;
    const int64_t items = std::clamp<int64_t>(work / kItemWork, 1, kItems);
    const int64_t parts =
        std::clamp<int64_t>(kSumBytes / bytes, 1, std::min(s_.batch * pieces, items));
    const int64_t splits = std::clamp<int64_t>(items / parts, 1, groups_);
    KeptBuffer<A> sums(parts * groups_ * per_group());
    torch::stable::parallel_for(0, parts * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item / splits, split = item % splits;
        const int64_t group = groups_ * split / splits, to_group = groups_ * (split + 1) / splits;
        A* const own = sums.data() + (part * groups_ + group) * per_group();
        const int64_t first = s_.batch * pieces * part / parts;
        for (int64_t p = first; p < s_.batch * pieces * (part + 1) / parts; ++p) {
          const int64_t t = p % pieces * steps;
          add_steps(p / pieces, t, std::min(t + steps, s_.length), group, to_group - group,
                    p > first, own);
        }
      }
    });
    finish(sums.data(), parts, to);
  }

 private:
  // Terms of a sum that meet before they join the others: short chains of additions round less.
  static constexpr int64_t kChain = 128;
  static constexpr int64_t kGroup = kConvOuts * kLanes<A>, kRows = kConvPixels;
  static constexpr int64_t kSumBytes = 8 << 20, kItems = 32, kItemWork = 1 << 21,
                           kStepBytes = 1 << 18;

  int64_t per_group() const { return s_.taps * blocks_ * kRows * kGroup; }

  // An odd number of lines of memory: neighbouring steps then lie in different sets of the cache.
  static int64_t pitch_of(int64_t channels) {
    return (round_up(channels, kLanes<A>) / kLanes<A> | 1) * kLanes<A>;
  }

  // Of which both sides stay in the second cache.
  int64_t steps_at_once() const {
    const int64_t step =
        rows_.move * pitch_of(rows_.channels) + lanes_.move * pitch_of(lanes_.channels);
    return std::clamp<int64_t>(kStepBytes / sizeof(A) / step / kChain, 1, 16) * kChain;
  }

  // The products of steps [begin, end) of sample n become the sums of `count` groups, or are added:
  // [group][block][tap][row][kGroup].
  void add_steps(int64_t n, int64_t begin, int64_t end, int64_t group, int64_t count, bool add,
                 A* totals) const {
    const Scratch rows(rows_, n, begin, end, s_.taps, 0, rows_.channels);
    const int64_t channels = std::min(count * kGroup, lanes_.channels - group * kGroup);
    const Scratch lanes(lanes_, n, begin, end, s_.taps, group * kGroup, channels);
    for (int64_t from = begin; from < end; from += kChain)
      for (int64_t g = 0; g < count; ++g) {
        auto* sums = reinterpret_cast<ConvSums<A>*>(totals + g * per_group());
        for (int64_t row = 0; row < rows_.channels; row += kRows)
          for (int64_t tap = 0; tap < s_.taps; ++tap, ++sums) {
            // Only what exists is multiplied: zero times infinity would not be zero.
            const int64_t ahead = s_.padding - tap * s_.dilation;
            const int64_t t = std::max(from, ceil_of(ahead));
            const int64_t to = std::min({from + kChain, end, ceil_of(s_.time + ahead)});
            add_block(rows_.channels - row, channels - g * kGroup, rows.at(t, tap) + row,
                      rows.pitch * rows_.move, lanes.at(t, tap) + g * kGroup,
                      lanes.pitch * lanes_.move, to - t, add || from > begin, *sums);
          }
      }
  }

  // The first step that is not before `at`, of x.
  int64_t ceil_of(int64_t at) const { return at <= 0 ? 0 : (at + s_.stride - 1) / s_.stride; }

  // Of the rows and lanes that are left.
  AIGC_INLINE static void add_block(int64_t rows_left, int64_t lanes_left, const S* rows,
                                    int64_t rows_pitch, const S* lanes, int64_t lanes_pitch,
                                    int64_t count, bool add, ConvSums<A>& totals) {
    const auto products = [&]<int P>(std::integral_constant<int, P>) {
      if (lanes_left > kLanes<A>)
        return add_outer_products<P, 2>(rows, rows_pitch, lanes, lanes_pitch, count, add, totals);
      add_outer_products<P, 1>(rows, rows_pitch, lanes, lanes_pitch, count, add, totals);
    };
    if (rows_left > kRows * 2 / 3) return products(std::integral_constant<int, kRows>{});
    if (rows_left > kRows / 3) return products(std::integral_constant<int, kRows * 2 / 3>{});
    products(std::integral_constant<int, kRows / 3>{});
  }

  // Some channels of a side, those of a step side by side and converted. What lies beyond the last
  // channel is anything, and so are sums of it.
  struct Scratch {
    const Side<T>& side;
    const int64_t first, pitch;
    KeptBuffer<S> memory;

    Scratch(const Side<T>& given, int64_t n, int64_t begin, int64_t end, int64_t taps,
            int64_t channel, int64_t channels)
        : side(given), first(side.first(begin)), pitch(pitch_of(channels)) {
      const int64_t count = std::max<int64_t>(0, side.last(end, taps) - first);
      memory = KeptBuffer<S>(count * pitch + kRows + kGroup);  // blocks reach beyond the last step
      SequenceInput<T> some = side.sequence;
      some.data += channel * some.channel_stride;
      if (count == 0) return;
      if constexpr (std::is_same_v<S, A>) {
        some.read(n, first, count, channels, memory.data(), pitch);
      } else {
        KeptBuffer<T> single((count + side.move) * pitch);
        some.read(n, first, count, channels, single.data(), pitch);
        pair_steps(single.data(), single.data() + side.move * pitch, count * pitch, memory.data());
      }
    }

    const S* at(int64_t t, int64_t tap) const {
      return memory.data() + (t * side.move - side.padding + tap * side.shift - first) * pitch;
    }
  };

  // The sums of all parts, in their order.
  void finish(const A* sums, int64_t parts, T* to) const {
    const int64_t per_row = s_.taps * kGroup, per_block = kRows * per_row;
    in_parallel(groups_ * blocks_, parts * per_block, [&](int64_t item) {
      const int64_t group = item / blocks_, row = item % blocks_ * kRows;
      const int64_t rows = std::min(kRows, rows_.channels - row);
      const int64_t lane = group * kGroup, lanes = std::min(kGroup, lanes_.channels - lane);
      KeptBuffer<A> total(per_block);  // [row][tap][kGroup]
      for (int64_t tap = 0; tap < s_.taps; ++tap)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t l = 0; l < kGroup; l += kLanes<A>) {
            const A* own = sums + item * per_block + (tap * kRows + i) * kGroup + l;
            Vec<A> sum = load(own);
            for (int64_t part = 1; part < parts; ++part)
              sum += load(own + part * groups_ * per_group());
            store(total.data() + i * per_row + tap * kGroup + l, sum);
          }
      if (!turned_)
        return copy_transposed(total.data(), kGroup, lanes, rows * s_.taps,
                               to + (lane * rows_.channels + row) * s_.taps,
                               rows_.channels * s_.taps);
      for (int64_t i = 0; i < rows; ++i)
        copy_transposed(total.data() + i * per_row, kGroup, lanes, s_.taps,
                        to + ((row + i) * lanes_.channels + lane) * s_.taps, s_.taps);
    });
  }

  const bool turned_;
  const Side<T> rows_, lanes_;
  const Places s_;
  const int64_t groups_ = (lanes_.channels + kGroup - 1) / kGroup;
  const int64_t blocks_ = (rows_.channels + kRows - 1) / kRows;
};

Tensor conv1d_backward_weight(const Tensor& grad, const Tensor& x, int64_t taps, int64_t stride,
                              int64_t padding, int64_t dilation, double grad_slope, double slope) {
  require(grad.dim() == 3 && x.dim() == 3, "grad and x must have 3 dimensions");
  require(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  require(taps >= 1 && taps < (1 << 30), "taps must be positive");
  require(padding >= 0 && padding < (1 << 30), "padding must not be negative");
  require(dilation >= 1 && dilation < (1 << 30) / taps, "dilation must be positive");
  require(stride >= 1 && stride < (1 << 20), "stride must be positive");
  const Places s{x.size(0), x.size(2), grad.size(2), taps, stride, padding, dilation};
  require(grad.size(0) == s.batch &&
              s.time + 2 * padding - dilation * (taps - 1) - 1 >= (s.length - 1) * stride,
          "grad must have the sizes of the output");
  Tensor weight = empty({grad.size(1), x.size(1), taps}, x.scalar_type());
  if (weight.numel() == 0) return weight;
  dispatch(x, "x", [&]<class T>(T) {
    if (grad.numel() == 0 || x.numel() == 0) {  // a sum of nothing
      std::memset(static_cast<void*>(mutable_data<T>(weight)), 0, weight.numel() * sizeof(T));
      return;
    }
    const Side<T> of_grad{sequence_of<T>(grad, grad_slope), grad.size(1), s.length, 1, 0, 0};
    const Side<T> of_x{sequence_of<T>(x, slope), x.size(1), s.time, stride, dilation, padding};
#if AIGC_BF16_DOT
    if constexpr (std::is_same_v<T, bf16>)
      if (has_bf16_dot())
        return Conv1dWeight<T, Bf16Pair>(of_grad, of_x, s).run(mutable_data<T>(weight));
#endif
    Conv1dWeight<T, Acc<T>>(of_grad, of_x, s).run(mutable_data<T>(weight));
  });
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("conv1d_backward_weight", TORCH_BOX(&conv1d_backward_weight));
}

}  // namespace
}  // namespace aigc_fast

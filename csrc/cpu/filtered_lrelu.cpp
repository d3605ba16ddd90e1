// Bias, upsampling FIR filter, leaky ReLU, clamp and downsampling FIR filter in one pass: of the
// upsampled plane a few rows exist at a time (fir_rows.h), and for backward two bits a pixel, which
// say whether it was at most 0 and whether it was clamped.
#include "channels.h"
#include "clamp.h"
#include "fir_rows.h"
#include "memory_order.h"

#include <aigc_fast/lane_bits.h>

namespace aigc_fast {
namespace {

constexpr int64_t kWord = 32;  // pixels of a word of bits

// The bits of a plane: [height][negative, clamped][words].
struct PlaneBits {
  uint32_t* at = nullptr;
  int64_t words;

  uint32_t* negative(int64_t row) const { return at + row * 2 * words; }
  uint32_t* clamped(int64_t row) const { return negative(row) + words; }
};

template <class A>
AIGC_INLINE Vec<A> activated(Vec<A> v, Vec<Bits<A>> low, A slope, A limit) {
  return clamp_to<A>(low ? v * slope : v, limit);
}

// to = clamp(lrelu(from)). Whole vectors are read and written; so below.
template <class A>
void activate_row(const A* from, int64_t size, A slope, A limit, A* to) {
  for (int64_t j = 0; j < size; j += kLanes<A>) {
    const Vec<A> v = load(from + j);
    store(to + j, activated<A>(v, v <= 0, slope, limit));
  }
}

// The same, and its bits.
template <class A>
void activate_row(const A* from, int64_t size, A slope, A limit, A* to, const PlaneBits& bits,
                  int64_t number) {
  for (int64_t j = 0; j < size; j += kWord) {
    uint32_t negative = 0, clamped = 0;
    for (int64_t k = 0; k < kWord && j + k < size; k += kLanes<A>) {
      const Vec<A> v = load(from + j + k);
      const Vec<Bits<A>> low = v <= 0;
      negative |= lane_bits<A>(low) << k;
      clamped |= lane_bits<A>(abs<A>(low ? v * slope : v) > limit) << k;
      store(to + j + k, activated<A>(v, low, slope, limit));
    }
    const uint32_t valid = size - j < kWord ? (1u << (size - j)) - 1 : ~0u;
    bits.negative(number)[j / kWord] = negative & valid;
    bits.clamped(number)[j / kWord] = clamped & valid;
  }
}

// to = from times the derivative of activate_row.
template <class A>
void apply_bits(const A* from, int64_t size, A slope, const PlaneBits& bits, int64_t number,
                A* to) {
  for (int64_t j = 0; j < size; j += kWord) {
    const uint32_t negative = bits.negative(number)[j / kWord];
    const uint32_t clamped = bits.clamped(number)[j / kWord];
    for (int64_t k = 0; k < kWord && j + k < size; k += kLanes<A>) {
      Vec<A> v = load(from + j + k);
      v = mask_of<A>(negative >> k) ? v * slope : v;
      store(to + j + k, mask_of<A>(clamped >> k) ? Vec<A>{} : v);
    }
  }
}

// What the operator and its derivative share: two filters, and something done to the rows between.
struct TwoFilters {
  Axis first_x, first_y, second_x, second_y;
  int64_t planes;

  int64_t height() const { return first_y.out; }  // between the filters
  int64_t width() const { return first_x.out; }
  int64_t words() const { return (width() + kWord - 1) / kWord; }

  TwoFilters(const Tensor& x, const Tensor& first, const Tensor& second,
             const std::vector<int64_t>& g) {
    require(x.dim() == 4, "x must have 4 dimensions");
    require(x.size(2) > 0 && x.size(3) > 0, "x must have at least one pixel");
    check_filter(first, "up_filter");
    check_filter(second, "down_filter");
    require(g.size() == 12, "geometry must have 12 numbers");
    planes = x.size(0) * x.size(1);
    first_x = axis_of(g[0], 1, g[4], g[5], first.size(first.dim() - 1), x.size(3));
    first_y = axis_of(g[1], 1, g[6], g[7], first.size(0), x.size(2));
    second_x = axis_of(1, g[2], g[8], g[9], second.size(second.dim() - 1), width());
    second_y = axis_of(1, g[3], g[10], g[11], second.size(0), height());
  }

  // between(from, plane, number, own, to) does it; a row that several units of work meet is one
  // unit's own.
  template <class T, class Between>
  void run(const Tensor& x, const MaybeTensor& bias_in, const Tensor& first, const Tensor& second,
           bool flip, double gain, Tensor& out, Between between) const {
    using A = Acc<T>;
    const Fir<A> up(first_y, first_x, first, flip, gain);
    const Fir<A> down(second_y, second_x, second, flip, 1.0);
    const int64_t channels = x.size(1);
    const std::vector<A> bias = channel_values<A>(bias_in, channels, "bias", 0);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    const int64_t rows = rows_of_unit(planes, second_y.out);
    const int64_t pieces = (second_y.out + rows - 1) / rows;
    const int64_t grain = grain_of(width() * rows);
    torch::stable::parallel_for(0, planes * pieces, grain, [&](int64_t begin, int64_t end) {
      RowFilter<A> upper(up), lower(down);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t plane = u / pieces, piece = u % pieces;
        const T* image = from + plane * first_y.in * first_x.in;
        const A b = bias[plane % channels];
        const auto read = [&](int64_t i, A* row) {
          for_vectors<A>(first_x.in, [&](int64_t j, auto lanes) {
            store(row + j, load(image + i * first_x.in + j, lanes) + b);
          });
        };
        const int64_t last = std::min(second_y.out, (piece + 1) * rows);
        const int64_t own = piece * rows * second_y.down;
        const int64_t own_end = piece + 1 == pieces ? height() : last * second_y.down;
        const auto activated = [&](int64_t m, A* row) {
          between(upper.row(m, read), plane, m, m >= own && m < own_end, row);
        };
        upper.restart(), lower.restart();
        for (int64_t o = piece * rows; o < last; ++o) {
          const A* row = lower.row(o, activated);
          T* result = to + (plane * second_y.out + o) * second_x.out;
          for_vectors<A>(second_x.out,
                         [&](int64_t j, auto lanes) { store(result + j, load(row + j), lanes); });
        }
      }
    });
  }
};

// The result in the memory order of x, which was read as planes.
Tensor in_layout_of(const Tensor& x, const Tensor& planes) {
  if (!is_channels_last(x)) return planes;
  Tensor out = empty_in_order(planes, true);
  torch::stable::copy_(out, planes);
  return out;
}

std::tuple<Tensor, Tensor> filtered_lrelu(const Tensor& x_in, const Tensor& up_filter,
                                          const Tensor& down_filter, const MaybeTensor& bias,
                                          std::vector<int64_t> geometry, bool flip, double gain,
                                          double slope, std::optional<double> clamp,
                                          bool keep_mask) {
  require(!bias || bias->scalar_type() == x_in.scalar_type(), "bias must have the dtype of x");
  require(geometry.size() == 8 || geometry.size() == 12, "geometry must have 8 or 12 numbers");
  geometry.resize(12);  // the second filter has no padding
  const TwoFilters s(x_in, up_filter, down_filter, geometry);
  const Tensor x = as_contiguous(x_in);
  const int64_t n = x.size(0), c = x.size(1), height = s.height(), words = s.words();
  Tensor y = empty({n, c, s.second_y.out, s.second_x.out}, x.scalar_type());
  Tensor mask =
      keep_mask ? empty({n, c, height, 2, words}, ScalarType::Int) : empty({0}, ScalarType::Int);
  uint32_t* bits = static_cast<uint32_t*>(mask.mutable_data_ptr());
  // Rows that no output needs are not computed; their bits are to be the same every time.
  if (keep_mask) std::fill_n(bits, mask.numel(), 0u);
  if (y.numel() == 0) return {in_layout_of(x_in, y), mask};
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const A limit = limit_of<A>(clamp);
    s.run<T>(x, bias, up_filter, down_filter, flip, gain, y,
             [&](const A* from, int64_t plane, int64_t number, bool own, A* to) {
               const PlaneBits of_plane{bits + plane * height * 2 * words, words};
               if (keep_mask && own) {
                 activate_row<A>(from, s.width(), A(slope), limit, to, of_plane, number);
               } else {
                 activate_row<A>(from, s.width(), A(slope), limit, to);
               }
             });
  });
  return {in_layout_of(x_in, y), mask};
}

Tensor filtered_mask(const Tensor& x_in, const Tensor& mask_in, const Tensor& first,
                     const Tensor& second, std::vector<int64_t> geometry, bool flip, double gain,
                     double slope) {
  const TwoFilters s(x_in, first, second, geometry);
  const Tensor x = as_contiguous(x_in), mask = as_contiguous(mask_in);
  require(mask.scalar_type() == ScalarType::Int &&
              mask.numel() == s.planes * s.height() * 2 * s.words(),
          "mask must have two bits for each pixel between the filters");
  Tensor y = empty({x.size(0), x.size(1), s.second_y.out, s.second_x.out}, x.scalar_type());
  if (y.numel() == 0) return in_layout_of(x_in, y);
  // Only read; const_cast because PlaneBits serves both.
  uint32_t* bits = static_cast<uint32_t*>(const_cast<void*>(mask.const_data_ptr()));
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    s.run<T>(x, {}, first, second, flip, gain, y,
             [&](const A* from, int64_t plane, int64_t number, bool, A* to) {
               const PlaneBits of_plane{bits + plane * s.height() * 2 * s.words(), s.words()};
               apply_bits<A>(from, s.width(), A(slope), of_plane, number, to);
             });
  });
  return in_layout_of(x_in, y);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("filtered_lrelu", TORCH_BOX(&filtered_lrelu));
  m.impl("filtered_mask", TORCH_BOX(&filtered_mask));
}

}  // namespace
}  // namespace aigc_fast

// Zero-insertion, padding, FIR filter and decimation of images in one pass, with bias, activation,
// gain and clamp at its end.
//
// Contiguous planes are filtered row by row (fir_rows.h). With channels_last the channels are the
// vectors, and nothing need be rearranged.
#include "act_dispatch.h"
#include "channels.h"
#include "clamp.h"
#include "fir_rows.h"
#include "memory_order.h"

namespace aigc_fast {
namespace {

template <class A>
struct Epilogue {
  A alpha, gain, limit;
};

// out[o] = epilogue(row[o] + bias); per_element: bias[o], else bias[0]. Whole vectors can be read.
template <class T, Act act>
void write_row(T* out, int64_t size, const Acc<T>* row, const Acc<T>* bias, bool per_element,
               Epilogue<Acc<T>> p) {
  using A = Acc<T>;
  for_vectors<A>(size, [&](int64_t o, auto lanes) __attribute__((always_inline)) {
    const Vec<A> v = load(row + o) + (per_element ? load(bias + o, lanes) : broadcast(bias[0]));
    store(out + o, clamp_to<A>(activate<act, A>(v, p.alpha) * p.gain, p.limit), lanes);
  });
}

template <class T>
struct Job {
  using A = Acc<T>;
  Fir<A> fir;
  int64_t channels;
  std::vector<int64_t> columns;  // channels_last: [output][tap], the pixel read or -1
  const T* in;
  T* out;
  std::vector<A> bias;
  decltype(&write_row<T, Act::linear>) write;
  Epilogue<A> epilogue;
};

// Rows [first, last) of one plane of a contiguous image.
template <class T, class A = Acc<T>>
void contiguous_rows(const Job<T>& job, RowFilter<A>& filter, int64_t plane, int64_t first,
                     int64_t last) {
  const Axis &x = job.fir.x, &y = job.fir.y;
  const T* in = job.in + plane * y.in * x.in;
  filter.restart();
  for (int64_t o = first; o < last; ++o) {
    const A* row = filter.row(o, [&](int64_t i, A* to) {
      for_vectors<A>(x.in,
                     [&](int64_t j, auto lanes) { store(to + j, load(in + i * x.in + j, lanes)); });
    });
    job.write(job.out + (plane * y.out + o) * x.out, x.out, row,
              job.bias.data() + plane % job.channels, false, job.epilogue);
  }
}

template <class T, class A>
struct PixelTap {
  const T* from;
  A weight;
};

// Row `o` of image n of a channels_last tensor.
template <class T>
void channels_last_row(const Job<T>& job, int64_t n, int64_t o) {
  using A = Acc<T>;
  const Axis &x = job.fir.x, &y = job.fir.y;
  const bool separable = job.fir.separable;
  const int64_t c = job.channels;
  const RowSpan rows = rows_read(y, o);
  std::vector<A> mixed(separable ? x.in * c : 0), result(c + kLanes<A>);
  const T* in = job.in + n * y.in * x.in * c;
  if (separable)
    for (int64_t r = 0; r < rows.count; ++r)
      for_vectors<A>(x.in * c, [&](int64_t j, auto lanes) {
        A* to = mixed.data() + j;
        const Vec<A> v = load(in + (rows.first + r) * x.in * c + j, lanes);
        store(to, load(to, lanes) + v * job.fir.vertical[rows.tap + r * y.up], lanes);
      });
  // `taps` of the pixel, each a pointer to channels and a weight.
  const auto sum_of = [&](const auto& taps) {
    for_vectors<A>(c, [&](int64_t j, auto lanes) {
      Vec<A> sum = {};
      for (const auto& tap : taps) sum += load(tap.from + j, lanes) * tap.weight;
      store(result.data() + j, sum, lanes);
    });
  };
  std::vector<PixelTap<A, A>> mixed_taps;
  std::vector<PixelTap<T, A>> taps;
  for (int64_t ox = 0; ox < x.out; ++ox) {
    mixed_taps.clear(), taps.clear();
    for (int64_t k = 0; k < x.taps; ++k) {
      const int64_t i = job.columns[ox * x.taps + k];
      if (i < 0) continue;
      if (separable) {
        mixed_taps.push_back({mixed.data() + i * c, job.fir.taps[k]});
      } else {
        for (int64_t r = 0; r < rows.count; ++r)
          taps.push_back(
              {in + ((rows.first + r) * x.in + i) * c, job.fir.weight(rows.tap + r * y.up, k)});
      }
    }
    if (separable) {
      sum_of(mixed_taps);
    } else {
      sum_of(taps);
    }
    job.write(job.out + ((n * y.out + o) * x.out + ox) * c, c, result.data(), job.bias.data(), true,
              job.epilogue);
  }
}

Tensor upfirdn2d(const Tensor& x_in, const Tensor& filter, std::vector<int64_t> geometry, bool flip,
                 double gain, const MaybeTensor& bias, int64_t act, double act_gain,
                 std::optional<double> clamp, double alpha) {
  require(x_in.dim() == 4, "x must have 4 dimensions");
  check_filter(filter, "filter");
  require(geometry.size() == 8, "geometry must have 8 numbers");
  require(x_in.size(2) > 0 && x_in.size(3) > 0, "x must have at least one pixel");
  require(!bias || bias->scalar_type() == x_in.scalar_type(), "bias must have the dtype of x");
  const auto& g = geometry;
  const int64_t n = x_in.size(0), c = x_in.size(1);
  const Axis x = axis_of(g[0], g[2], g[4], g[5], filter.size(filter.dim() - 1), x_in.size(3));
  const Axis y = axis_of(g[1], g[3], g[6], g[7], filter.size(0), x_in.size(2));
  const bool last = is_channels_last(x_in);
  const Tensor source = in_memory_order(x_in);
  Tensor out = empty_in_order({n, c, y.out, x.out}, x_in.scalar_type(), last);
  if (out.numel() == 0) return out;
  dispatch(source, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Epilogue<A> epilogue{A(alpha), A(act_gain), limit_of<A>(clamp)};
    Job<T> job{
        Fir<A>(y, x, filter, flip, gain),      c,  {},      data<T>(source), mutable_data<T>(out),
        channel_values<A>(bias, c, "bias", 0), {}, epilogue};
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) { job.write = &write_row<T, a>; });
    if (last) {
      for (int64_t o = 0; o < x.out; ++o)
        for (int64_t k = 0; k < x.taps; ++k) {
          int64_t i;
          const bool found = x.source(o, k, &i) && i >= 0 && i < x.in;
          job.columns.push_back(found ? i : -1);
        }
      in_parallel(n * y.out, x.out * c,
                  [&](int64_t u) { channels_last_row(job, u / y.out, u % y.out); });
    } else {
      const int64_t rows = rows_of_unit(n * c, y.out), pieces = (y.out + rows - 1) / rows;
      const int64_t grain = grain_of(x.out * rows);
      torch::stable::parallel_for(0, n * c * pieces, grain, [&](int64_t begin, int64_t end) {
        RowFilter<A> filter(job.fir);
        for (int64_t u = begin; u < end; ++u) {
          const int64_t first = u % pieces * rows;
          contiguous_rows(job, filter, u / pieces, first, std::min(y.out, first + rows));
        }
      });
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace
}  // namespace aigc_fast

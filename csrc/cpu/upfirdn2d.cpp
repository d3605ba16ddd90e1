// Zero-insertion, padding, FIR filter and decimation of images in one pass, with bias, activation,
// gain and clamp at its end.
//
// Output pixel o reads input pixel i through tap k where i up = o down + k - pad: zeros that `up`
// inserts are never multiplied. Along a contiguous row, outputs of one phase (o mod P, with
// P = up / gcd(up, down)) share their taps and read inputs `step` = down / gcd apart: rows are
// kept in fp32, padded with zeros and split by that step, so that every load is of neighbours.
// With channels_last the channels are the vectors, and nothing need be rearranged.
#include <numeric>

#include "act_dispatch.h"
#include "channels.h"
#include "memory_order.h"

namespace aigc_fast {
namespace {

// One direction.
struct Axis {
  int64_t up, down, pad, taps, in, out;

  // The input that output o reads through tap k; false where that is an inserted zero.
  bool source(int64_t o, int64_t k, int64_t* i) const {
    const int64_t at = o * down + k - pad;
    *i = (at - (at % up + up) % up) / up;
    return *i * up == at;
  }
};

template <class A>
struct Epilogue {
  A alpha, gain, limit;
};

// out[o] = epilogue(line[o % phases][o / phases] + bias); per_element: bias[o], else bias[0].
template <class T, Act act>
void write_row(T* out, int64_t size, const Acc<T>* line, int64_t phases, int64_t stride,
               const Acc<T>* bias, bool per_element, Epilogue<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int kAll = kLanes<A>;
  Vec<Bits<A>> zip;
  for (int k = 0; k < kAll; ++k) zip[k] = k / 2 + k % 2 * kAll;
  for_vectors<A>(size, [&](int64_t o, auto lanes) __attribute__((always_inline)) {
    Vec<A> v;
    if (phases == 1) {
      v = load(line + o, lanes);
    } else if (phases == 2) {  // lines are padded: whole vectors can be read
      v = __builtin_shuffle(load(line + o / 2), load(line + stride + o / 2), zip);
    } else {
      for (int64_t k = 0; k < kAll; ++k) v[k] = line[(o + k) % phases * stride + (o + k) / phases];
    }
    v += per_element ? load(bias + o, lanes) : broadcast(bias[0]);
    v = activate<act, A>(v, p.alpha) * p.gain;
    v = max<A>(min<A>(v, broadcast(p.limit)), broadcast(-p.limit));
    store(out + o, v, lanes);
  });
}

template <class T>
struct Job {
  using A = Acc<T>;
  Axis y, x;
  int64_t channels;
  bool separable;
  std::vector<A> filter;         // [height][width] as correlated, or the taps of both directions
  std::vector<A> vertical;       // separable: the taps times gain
  std::vector<int64_t> columns;  // channels_last: [output][tap], the pixel read or -1
  const T* in;
  T* out;
  std::vector<A> bias;
  decltype(&write_row<T, Act::linear>) write;
  Epilogue<A> epilogue;

  A weight(int64_t ky, int64_t kx) const { return filter[ky * x.taps + kx]; }
};

template <class T, class A>
struct Tap {
  const T* from;
  A weight;
};

// The rows that output row o reads, as (tap, input row).
struct RowTap {
  int64_t tap, row;
};
void row_taps(const Axis& y, int64_t o, std::vector<RowTap>* found) {
  found->clear();
  int64_t i;
  for (int64_t k = 0; k < y.taps; ++k)
    if (y.source(o, k, &i) && i >= 0 && i < y.in) found->push_back({k, i});
}

constexpr int64_t kRows = 32;  // output rows of a unit of work

// Rows [first, last) of one plane of a contiguous image.
template <class T>
void contiguous_rows(const Job<T>& job, int64_t plane, int64_t first, int64_t last) {
  using A = Acc<T>;
  constexpr int kAll = kLanes<A>;
  const Axis &x = job.x, &y = job.y;
  const int64_t common = std::gcd(x.up, x.down), phases = x.up / common, step = x.down / common;
  const int64_t columns = (x.out + phases - 1) / phases;  // outputs of a phase
  const int64_t stride = (columns + kAll) / kAll * kAll + kAll;
  int64_t lowest, highest;
  x.source(0, 0, &lowest);
  x.source(x.out - 1 + phases, x.taps - 1, &highest);
  const int64_t length = ((highest - lowest) / step + 2 * kAll) / kAll * kAll + kAll;
  const int64_t ring = (y.taps - 1) / y.up + 2;
  std::vector<A> lines(ring * step * length), mixed(job.separable ? step * length : 0);
  std::vector<A> result(phases * stride), row(x.in + kAll);
  std::vector<RowTap> rows;
  std::vector<Tap<A, A>> taps;
  int64_t filled = 0;
  const T* in = job.in + plane * y.in * x.in;

  // Which element of a line the outputs of a phase start from; found once, divisions are slow.
  struct PhaseTap {
    int64_t phase, tap, at;
  };
  std::vector<PhaseTap> plan;
  for (int64_t p = 0; p < phases && p < x.out; ++p)
    for (int64_t k = 0; k < x.taps; ++k) {
      int64_t i;
      if (x.source(p, k, &i))
        plan.push_back({p, k, (i - lowest) % step * length + (i - lowest) / step});
    }

  const auto fill = [&](int64_t i) {
    A* line = lines.data() + i % ring * step * length;
    const int64_t begin = std::max<int64_t>(0, lowest), end = std::min(x.in, highest + 1);
    const T* from = in + i * x.in;
    A* to = step == 1 ? line - lowest : row.data();
    for_vectors<A>(end - begin, [&](int64_t j, auto lanes) {
      store(to + begin + j, load(from + begin + j, lanes), lanes);
    });
    if (step == 1) return;
    for (int64_t q = 0; q < step; ++q) {
      // the first pixel from `begin` that lies on this line
      const int64_t start = begin + ((lowest + q - begin) % step + step) % step;
      A* to = line + q * length + (start - lowest) / step;
      for (int64_t j = start; j < end; j += step) *to++ = row[j];
    }
  };

  for (int64_t o = first; o < last; ++o) {
    row_taps(y, o, &rows);
    for (const RowTap& r : rows)
      if (r.row >= filled) fill(r.row), filled = r.row + 1;
    if (job.separable) {
      std::fill(mixed.begin(), mixed.end(), A(0));
      for (const RowTap& r : rows) {
        const A* line = lines.data() + r.row % ring * step * length;
        const A weight = job.vertical[r.tap];
        for (int64_t j = 0; j < step * length; j += kAll)
          store(mixed.data() + j, load(mixed.data() + j) + load(line + j) * weight);
      }
    }
    for (int64_t p = 0; p < phases; ++p) {
      taps.clear();
      for (const PhaseTap& t : plan) {
        if (t.phase != p) continue;
        if (job.separable) {
          taps.push_back({mixed.data() + t.at, job.filter[t.tap]});
        } else {
          for (const RowTap& r : rows)
            taps.push_back(
                {lines.data() + r.row % ring * step * length + t.at, job.weight(r.tap, t.tap)});
        }
      }
      for (int64_t m = 0; m < columns; m += kAll) {
        Vec<A> sum = {};
        for (const auto& tap : taps) sum += load(tap.from + m) * tap.weight;
        store(result.data() + p * stride + m, sum);
      }
    }
    job.write(job.out + (plane * y.out + o) * x.out, x.out, result.data(), phases, stride,
              job.bias.data() + plane % job.channels, false, job.epilogue);
  }
}

// Row `o` of image n of a channels_last tensor.
template <class T>
void channels_last_row(const Job<T>& job, int64_t n, int64_t o) {
  using A = Acc<T>;
  const Axis &x = job.x, &y = job.y;
  const int64_t c = job.channels;
  std::vector<RowTap> rows;
  row_taps(y, o, &rows);
  std::vector<A> mixed(job.separable ? x.in * c : 0), result(c + kLanes<A>);
  const T* in = job.in + n * y.in * x.in * c;
  if (job.separable)
    for (const RowTap& r : rows)
      for_vectors<A>(x.in * c, [&](int64_t j, auto lanes) {
        A* to = mixed.data() + j;
        const Vec<A> v = load(in + r.row * x.in * c + j, lanes);
        store(to, load(to, lanes) + v * job.vertical[r.tap], lanes);
      });
  // `taps` of the pixel, each a pointer to channels and a weight.
  const auto sum_of = [&](const auto& taps) {
    for_vectors<A>(c, [&](int64_t j, auto lanes) {
      Vec<A> sum = {};
      for (const auto& tap : taps) sum += load(tap.from + j, lanes) * tap.weight;
      store(result.data() + j, sum, lanes);
    });
  };
  std::vector<Tap<A, A>> mixed_taps;
  std::vector<Tap<T, A>> taps;
  for (int64_t ox = 0; ox < x.out; ++ox) {
    mixed_taps.clear(), taps.clear();
    for (int64_t k = 0; k < x.taps; ++k) {
      const int64_t i = job.columns[ox * x.taps + k];
      if (i < 0) continue;
      if (job.separable) {
        mixed_taps.push_back({mixed.data() + i * c, job.filter[k]});
      } else {
        for (const RowTap& r : rows)
          taps.push_back({in + (r.row * x.in + i) * c, job.weight(r.tap, k)});
      }
    }
    if (job.separable) {
      sum_of(mixed_taps);
    } else {
      sum_of(taps);
    }
    job.write(job.out + ((n * y.out + o) * x.out + ox) * c, c, result.data(), 1, 0, job.bias.data(),
              true, job.epilogue);
  }
}

Tensor upfirdn2d(const Tensor& x_in, const Tensor& filter, std::vector<int64_t> geometry, bool flip,
                 double gain, const std::optional<Tensor>& bias, int64_t act, double act_gain,
                 std::optional<double> clamp, double alpha) {
  require(x_in.dim() == 4, "x must have 4 dimensions");
  require(filter.numel() > 0 && (filter.dim() == 1 || filter.dim() == 2),
          "filter must have shape (height, width) or (taps,)");
  require(geometry.size() == 8, "geometry must have 8 numbers");
  require(*std::min_element(geometry.begin(), geometry.begin() + 4) >= 1,
          "up and down must be at least 1");
  require(x_in.size(2) > 0 && x_in.size(3) > 0, "x must have at least one pixel");
  require(!bias || bias->scalar_type() == x_in.scalar_type(), "bias must have the dtype of x");
  const auto& g = geometry;
  const int64_t n = x_in.size(0), c = x_in.size(1);
  Axis x{g[0], g[2], g[4], filter.size(filter.dim() - 1), x_in.size(3), 0};
  Axis y{g[1], g[3], g[6], filter.size(0), x_in.size(2), 0};
  const int64_t height = y.in * y.up + g[6] + g[7] - y.taps;
  const int64_t width = x.in * x.up + g[4] + g[5] - x.taps;
  require(height >= 0 && width >= 0, "filter must not be larger than the padded image");
  y.out = height / y.down + 1;
  x.out = width / x.down + 1;
  const bool last = is_channels_last(x_in);
  const Tensor source = last ? x_in : as_contiguous(x_in);
  const std::vector<int64_t> sizes{n, c, y.out, x.out};
  const std::vector<int64_t> strides{y.out * x.out * c, 1, x.out * c, c};
  Tensor out =
      last ? empty_strided(sizes, strides, x_in.scalar_type()) : empty(sizes, x_in.scalar_type());
  if (out.numel() == 0) return out;
  dispatch(source, "x", [&]<class T>(T) {
    using A = Acc<T>;
    Job<T> job{y,
               x,
               c,
               filter.dim() == 1,
               {},
               {},
               {},
               data<T>(source),
               mutable_data<T>(out),
               {},
               {},
               {A(alpha), A(act_gain), clamp ? A(*clamp) : std::numeric_limits<A>::infinity()}};
    job.filter.resize(filter.numel());
    const Tensor taps = as_contiguous(filter);
    dispatch(taps, "filter", [&]<class F>(F) {
      for (int64_t i = 0; i < filter.numel(); ++i)
        job.filter[i] = static_cast<A>(load_n(data<F>(taps) + i, 1)[0]);
    });
    if (!flip) std::reverse(job.filter.begin(), job.filter.end());
    if (job.separable) job.vertical = job.filter;
    for (A& tap : job.separable ? job.vertical : job.filter) tap = static_cast<A>(tap * gain);
    job.bias.resize(c);
    channel_values<A>(bias, c, "bias", 0, job.bias.data());
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) { job.write = &write_row<T, a>; });
    const int64_t grain = std::max<int64_t>(1, kGrain / (x.out * (last ? c : kRows)));
    if (last) {
      for (int64_t o = 0; o < x.out; ++o)
        for (int64_t k = 0; k < x.taps; ++k) {
          int64_t i;
          const bool found = x.source(o, k, &i) && i >= 0 && i < x.in;
          job.columns.push_back(found ? i : -1);
        }
      torch::stable::parallel_for(0, n * y.out, grain, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) channels_last_row(job, u / y.out, u % y.out);
      });
    } else {
      const int64_t pieces = (y.out + kRows - 1) / kRows;
      torch::stable::parallel_for(0, n * c * pieces, grain, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
          const int64_t first = u % pieces * kRows;
          contiguous_rows(job, u / pieces, first, std::min(y.out, first + kRows));
        }
      });
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace
}  // namespace aigc_fast

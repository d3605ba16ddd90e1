// The derivative of the adaLN chain (layer_norm.h) and of its gated residual alone.
#include "layer_norm.h"
#include "stream.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Rows whose sums for scale, shift and gate are added before they meet those of other rows; the
// blocks depend on the shape alone, so that sums come out the same for any number of threads.
constexpr int64_t kMaxBlocks = 64, kMinBlockRows = 4;

// How rows are cut into blocks, none of which has rows of two runs.
struct Blocks {
  int64_t count, run, block, per_run;

  Blocks(int64_t rows, int64_t modulations) : count(modulations) {
    run = modulations ? rows / modulations : 0;
    const int64_t wanted = std::max(kMinBlockRows, (rows + kMaxBlocks - 1) / kMaxBlocks);
    block = std::max<int64_t>(1, std::min(run, wanted));
    per_run = (run + block - 1) / block;
  }
  // f(block, modulation row, first row, past the last), in parallel.
  template <class F>
  void for_each(int64_t width, F&& f) const {
    const int64_t grain = grain_of(width * block);
    torch::stable::parallel_for(0, count * per_run, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i / per_run, first = m * run + i % per_run * block;
        f(i, m, first, std::min(first + block, (m + 1) * run));
      }
    });
  }
};

// Rows that are looked at twice, for what the norm's gradient sums along a row and for the sums
// over rows, which stay in registers: the second time they are in the L2 cache.
constexpr int64_t kGroupRows = 8;

// dy is the gradient of the modulated norm of h, dsum that of h itself. Sums over the run:
//   P = dy * n, Q = dy, R = dh * branch
template <class T, bool rms, bool gated>
struct Group {
  using A = Acc<T>;
  static constexpr int kSums = gated ? 3 : 2;
  int64_t width, rows;
  double eps;
  const T *h, *dy, *dsum, *branch;  // rows lie so many elements apart:
  int64_t h_stride, dy_stride, dsum_stride, branch_stride;
  T *dh, *dbranch;
  const A *slope, *gate;  // weight * (1 + scale), and gate, as `prepare` makes them
  bool streams;

  struct RowOf {
    A mean, factor, mean_g, mean_gn;
  };
  RowOf look(int64_t r) const {
    const auto found = row_moments<T, !rms, 2, 2, 1>({h + r * h_stride, dy + r * dy_stride}, width,
                                                     [](Vec<A> d, auto& v, Vec<A>* to) {
                                                       const Vec<A> g = v[1] * v[2];
                                                       to[0] += g;
                                                       to[1] += g * d;
                                                     },
                                                     {slope});
    const A factor = 1 / std::sqrt(found.variance + A(eps)), rest = found.rest;
    return {found.near + rest, factor, rms ? 0 : found.sums[2] / width,
            (found.sums[3] - rest * found.sums[2]) / width * factor};
  }
  // P, Q and R lie one after the other; they are added to unless this is the first group of a
  // block, and come in the order of columns with the last.
  void add_to(A* sums, bool first, bool last) const {
    RowOf of[kGroupRows];
    for (int64_t r = 0; r < rows; ++r) of[r] = look(r);
    for_columns<T, 0>(width, {}, [&](int64_t j, auto n, auto&, auto&) {
      const Vectors<A, 2> s = load_two(slope + j, n), g = load_two(gate + j, n);
      Vectors<A, 2> sum[kSums] = {};
      for (int64_t r = 0; r < rows; ++r) {
        // Memory is asked for the next group meanwhile.
        const auto read = [&](const T* p, int64_t stride) {
          ask_for<0>(p + (r + kGroupRows) * stride + j, n);
          return load_two(p + r * stride + j, n);
        };
        const auto write = [&](T* p, const Vectors<A, 2>& v) {
          if (streams) return stream_two(p + r * width + j, v, n);
          ask_for<1>(p + (r + kGroupRows) * width + j, n);
          store_two(p + r * width + j, v, n);
        };
        const Vectors<A, 2> at = read(h, h_stride), up = read(dy, dy_stride);
        Vectors<A, 2> d = {}, x, to;
        if (dsum) d = read(dsum, dsum_stride);
        if constexpr (gated) x = read(branch, branch_stride);
#pragma GCC unroll 2  // else the sums stay in memory
        for (int k = 0; k < 2; ++k) {
          const Vec<A> normed = (at[k] - of[r].mean) * of[r].factor;
          d[k] += (up[k] * s[k] - of[r].mean_g - normed * of[r].mean_gn) * of[r].factor;
          sum[0][k] += up[k] * normed;
          sum[1][k] += up[k];
          if constexpr (gated) sum[2][k] += d[k] * x[k], to[k] = d[k] * g[k];
        }
        write(dh, d);
        if constexpr (gated) write(dbranch, to);
      }
#pragma GCC unroll 3
      for (int k = 0; k < kSums; ++k) {
        A* to = sums + k * width + j;
        if (!first) {
          const Vectors<A, 2> before = load_two(to, n);
          sum[k][0] += before[0], sum[k][1] += before[1];
        }
        if (last && std::is_same_v<decltype(n), TwoVectors<A>>)
          pair_to_halves<T>(sum[k][0], sum[k][1]);
        store_two(to, sum[k], n);
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_norm_backward(
    const Tensor& dy_in, const MaybeTensor& dsum_in, const Tensor& h_in,
    const MaybeTensor& branch_in, const MaybeTensor& gate_in, const MaybeTensor& scale_in,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool rms) {
  const Modulation modulation(h_in, {&gate_in, &scale_in});
  check_affine(weight, h_in);
  check_affine(bias, h_in);
  check_like(dy_in, h_in, "grad_output");
  if (dsum_in) check_like(*dsum_in, h_in, "grad_residual");
  if (branch_in) check_like(*branch_in, h_in, "branch");
  const bool gated = gate_in && branch_in;
  const Rows h = as_rows(h_in), dy = as_rows(dy_in), dsum = dsum_in ? as_rows(*dsum_in) : dy;
  const Rows branch = gated ? as_rows(*branch_in) : h;
  const int64_t width = h.width, count = modulation.count;
  const ScalarType dtype = h_in.scalar_type();
  const Rows gate = modulation_rows(gate_in, modulation.dtype, count, width, 0);
  const Rows scale = modulation_rows(scale_in, modulation.dtype, count, width, 0);
  const Rows w = modulation_rows(weight, dtype, 1, width, 1);
  const Rows b = modulation_rows(bias, dtype, 1, width, 0);
  auto like = [&](const MaybeTensor& p) { return p ? empty_like_rows(*p) : empty({0}, dtype); };
  Tensor dh = empty_like_rows(h_in), dbranch = gated ? empty_like_rows(h_in) : empty({0}, dtype);
  Tensor dgate = like(gate_in), dscale = like(scale_in), dshift = like(scale_in);
  Tensor dweight = like(weight), dbias = like(bias);
  const Blocks blocks(h.count, count);
  modulation.dispatch_with(h_in, [&]<class T, class M>(T, M) {
    using A = Acc<T>;
    const int64_t sums = gated ? 3 : 2;
    KeptBuffer<A> partial(blocks.count * blocks.per_run * sums * width);
    const bool streams = may_stream<T>(dh, width) && (!gated || may_stream<T>(dbranch, width));
    auto in_blocks = [&]<bool is_rms, bool is_gated>() {
      blocks.for_each(width, [&](int64_t i, int64_t m, int64_t first, int64_t last) {
        KeptBuffer<A> prepared(2 * width);
        A *slope = prepared.data(), *gates = slope + width;
        prepare<T, M, 2, 1, 2>(width, {w.at<T>(0)}, {scale.at<M>(m), gate.at<M>(m)}, {slope, gates},
                               [](auto& v) { return Vectors<A, 2>{{v[0] * (A(1) + v[1]), v[2]}}; });
        for (int64_t r = first; r < last; r += kGroupRows) {
          const Group<T, is_rms, is_gated> group{width,
                                                 std::min(kGroupRows, last - r),
                                                 eps,
                                                 h.at<T>(r),
                                                 dy.at<T>(r),
                                                 dsum_in ? dsum.at<T>(r) : nullptr,
                                                 branch.at<T>(r),
                                                 h.stride,
                                                 dy.stride,
                                                 dsum.stride,
                                                 branch.stride,
                                                 mutable_data<T>(dh) + r * width,
                                                 mutable_data<T>(dbranch) + r * width,
                                                 slope,
                                                 gates,
                                                 streams};
          group.add_to(partial.data() + i * sums * width, r == first, r + kGroupRows >= last);
        }
        if (streams) end_of_stream();
      });
    };
    with_flags(rms, gated, in_blocks);
    M *to_scale = mutable_data<M>(dscale), *to_shift = mutable_data<M>(dshift);
    M* to_gate = mutable_data<M>(dgate);
    T *to_w = mutable_data<T>(dweight), *to_b = mutable_data<T>(dbias);
    const int64_t columns = 4 * kLanes<A>, pieces = (width + columns - 1) / columns;
    const int64_t grain = grain_of(blocks.count * blocks.per_run * columns);
    torch::stable::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * columns;
      for_vectors<A>(std::min(width, end * columns) - from, [&](int64_t offset, auto n) {
        const int64_t j = from + offset;
        const Vec<A> wt = load(w.at<T>(0) + j, n), bs = load(b.at<T>(0) + j, n);
        Vec<A> total_w = {}, total_b = {};
        for (int64_t m = 0; m < blocks.count; ++m) {
          Vec<A> v[3] = {};
          for (int64_t i = m * blocks.per_run; i < (m + 1) * blocks.per_run; ++i)
            for (int64_t k = 0; k < sums; ++k)
              v[k] += load(partial.data() + (i * sums + k) * width + j, n);
          const Vec<A> s = A(1) + load(scale.at<M>(m) + j, n);
          total_w += v[0] * s;
          total_b += v[1] * s;
          if (scale_in) {
            store(to_scale + m * width + j, v[0] * wt + v[1] * bs, n);
            store(to_shift + m * width + j, v[1], n);
          }
          if (gated) store(to_gate + m * width + j, v[2], n);
        }
        if (weight) store(to_w + j, total_w, n);
        if (bias) store(to_b + j, total_b, n);
      });
    });
  });
  return {dh, dbranch, dgate, dscale, dshift, dweight, dbias};
}

// (dx, dgate) = (dy * gate, dy * x summed over the run)
std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& dy_in, const Tensor& x_in,
                                                   const Tensor& gate_in) {
  const MaybeTensor maybe = gate_in;
  const Modulation modulation(x_in, {&maybe});
  check_like(dy_in, x_in, "grad_output");
  const Rows x = as_rows(x_in), dy = as_rows(dy_in), gate = as_rows(gate_in);
  Tensor dx = empty_like_rows(x_in), dgate = empty_like_rows(gate_in);
  const Blocks blocks(x.count, modulation.count);
  const int64_t width = x.width;
  modulation.dispatch_with(x_in, [&]<class T, class M>(T, M) {
    using A = Acc<T>;
    std::vector<A> partial(blocks.count * blocks.per_run * width);
    T* to = mutable_data<T>(dx);
    M* to_gate = mutable_data<M>(dgate);
    blocks.for_each(width, [&](int64_t i, int64_t m, int64_t first, int64_t last) {
      A* sum = partial.data() + i * width;
      for (int64_t r = first; r < last; ++r) {
        const T *in = x.at<T>(r), *grad = dy.at<T>(r);
        const M* g = gate.at<M>(m);
        for_vectors<A>(width, [&](int64_t j, auto n) {
          const Vec<A> d = load(grad + j, n);
          store(to + r * width + j, d * load(g + j, n), n);
          store(sum + j, load(sum + j, n) + d * load(in + j, n), n);
        });
      }
    });
    torch::stable::parallel_for(
        0, modulation.count, grain_of(blocks.per_run * width), [&](int64_t begin, int64_t end) {
          for (int64_t m = begin; m < end; ++m)
            add_partial_sums(partial.data() + m * blocks.per_run * width, blocks.per_run, width,
                             width, to_gate + m * width);
        });
  });
  return {dx, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
}

}  // namespace
}  // namespace aigc_fast

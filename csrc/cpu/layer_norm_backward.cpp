// The derivative of the adaLN chain (layer_norm.h) and of its gated residual alone.
#include "layer_norm.h"
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

// dy is the gradient of the modulated norm of h, dsum that of h itself. Sums over the run:
//   P = dy * n, Q = dy, R = dh * branch
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_norm_backward(
    const Tensor& dy_in, const MaybeTensor& dsum_in, const Tensor& h_in,
    const MaybeTensor& branch_in, const MaybeTensor& gate_in, const MaybeTensor& scale_in,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool rms) {
  const int64_t count = count_modulation(h_in, {&gate_in, &scale_in});
  check_affine(weight, h_in);
  check_affine(bias, h_in);
  check_like(dy_in, h_in, "grad_output");
  if (dsum_in) check_like(*dsum_in, h_in, "grad_residual");
  if (branch_in) check_like(*branch_in, h_in, "branch");
  const bool gated = gate_in && branch_in;
  const Rows h = as_rows(h_in), dy = as_rows(dy_in), dsum = dsum_in ? as_rows(*dsum_in) : dy;
  const Rows branch = gated ? as_rows(*branch_in) : h;
  const Rows gate = modulation_rows(gate_in, h_in, count, 0);
  const Rows scale = modulation_rows(scale_in, h_in, count, 0);
  const Rows w = modulation_rows(weight, h_in, 1, 1), b = modulation_rows(bias, h_in, 1, 0);
  const int64_t width = h.width;
  const auto dtype = h_in.scalar_type();
  auto like = [&](const MaybeTensor& p) { return p ? empty_like_rows(*p) : empty({0}, dtype); };
  Tensor dh = empty_like_rows(h_in), dbranch = gated ? empty_like_rows(h_in) : empty({0}, dtype);
  Tensor dgate = like(gate_in), dscale = like(scale_in), dshift = like(scale_in);
  Tensor dweight = like(weight), dbias = like(bias);
  const Blocks blocks(h.count, count);
  dispatch(h_in, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const int64_t sums = gated ? 3 : 2, paired = width / (2 * kLanes<A>)*2 * kLanes<A>;
    std::vector<A> partial(blocks.count * blocks.per_run * sums * width);
    T *dh_at = mutable_data<T>(dh), *dbranch_at = mutable_data<T>(dbranch);
    with_flags(rms, gated, [&]<bool is_rms, bool is_gated>() {
      blocks.for_each(width, [&](int64_t i, int64_t m, int64_t first, int64_t last) {
        A* P = partial.data() + i * sums * width;
        A *Q = P + width, *R = Q + width;
        const T *s = scale.at<T>(m), *g = gate.at<T>(m), *wt = w.at<T>(0);
        for (int64_t r = first; r < last; ++r) {
          const T *in = h.at<T>(r), *grad = dy.at<T>(r), *x = branch.at<T>(r);
          const T* added = dsum_in ? dsum.at<T>(r) : nullptr;
          const auto found = statistics<T, is_rms, 2, 4>(
              {in, grad, s, wt}, width, eps, [](Vec<A> d, auto& v, Vec<A>* to) {
                const Vec<A> of = v[1] * v[3], g = of + of * v[2];
                to[0] += g;
                to[1] += g * d;
              });
          const A mean = found.mean, factor = found.factor;
          const A mean_g = is_rms ? 0 : found.sums[2] / width;
          const A mean_gn = (found.sums[3] - found.rest * found.sums[2]) / width * factor;
          T *out = dh_at + r * width, *out_branch = dbranch_at + r * width;
          // The gradient of h; the sums of column j go to P[j], Q[j] and R[j].
          auto step = [=](Vec<A> at, Vec<A> up, Vec<A> weight, Vec<A> scale, Vec<A> sum, Vec<A> x,
                          int64_t j, auto n) {
            const Vec<A> normed = (at - mean) * factor, of = up * weight, v = of + of * scale;
            const Vec<A> d = (v - mean_g - normed * mean_gn) * factor + sum;
            store(P + j, load(P + j, n) + up * normed, n);
            store(Q + j, load(Q + j, n) + up, n);
            if constexpr (is_gated) store(R + j, load(R + j, n) + d * x, n);
            return d;
          };
          constexpr int lanes = kLanes<A>;
          for (int64_t j = 0; j < paired; j += 2 * lanes) {
            const std::integral_constant<int, lanes> all;
            Vec<A> at[2], up[2], weight[2], scale[2], sum[2] = {}, x2[2] = {}, gate2[2];
            load_pair(in + j, at[0], at[1]);
            load_pair(grad + j, up[0], up[1]);
            load_pair(wt + j, weight[0], weight[1]);
            load_pair(s + j, scale[0], scale[1]);
            if (added) load_pair(added + j, sum[0], sum[1]);
            if constexpr (is_gated) load_pair(x + j, x2[0], x2[1]);
            const Vec<A> a = step(at[0], up[0], weight[0], scale[0], sum[0], x2[0], j, all);
            const Vec<A> b = step(at[1], up[1], weight[1], scale[1], sum[1], x2[1], j + lanes, all);
            store_two(out + j, a, b);
            if constexpr (is_gated) {
              load_pair(g + j, gate2[0], gate2[1]);
              store_two(out_branch + j, a * gate2[0], b * gate2[1]);
            }
          }
          for_vectors<A>(width - paired, [&](int64_t i, auto n) {
            const int64_t j = paired + i;
            const Vec<A> d =
                step(load(in + j, n), load(grad + j, n), load(wt + j, n), load(s + j, n),
                     added ? load(added + j, n) : Vec<A>{}, load(x + j, n), j, n);
            store(out + j, d, n);
            if constexpr (is_gated) store(out_branch + j, d * load(g + j, n), n);
          });
        }
        // From the order of load_pair to that of the columns.
        for (int64_t k = 0; k < sums; ++k)
          for (int64_t j = 0; j < paired; j += 2 * kLanes<A>) {
            A* to = P + k * width + j;
            Vec<A> a = load(to), b = load(to + kLanes<A>);
            pair_to_halves<T>(a, b);
            store(to, a);
            store(to + kLanes<A>, b);
          }
      });
    });
    T *to_scale = mutable_data<T>(dscale), *to_shift = mutable_data<T>(dshift);
    T *to_gate = mutable_data<T>(dgate), *to_w = mutable_data<T>(dweight);
    T* to_b = mutable_data<T>(dbias);
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
          const Vec<A> s = A(1) + load(scale.at<T>(m) + j, n);
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
  const int64_t count = count_modulation(x_in, {&maybe});
  check_like(dy_in, x_in, "grad_output");
  const Rows x = as_rows(x_in), dy = as_rows(dy_in), gate = as_rows(gate_in);
  Tensor dx = empty_like_rows(x_in), dgate = empty_like_rows(gate_in);
  const Blocks blocks(x.count, count);
  const int64_t width = x.width;
  dispatch(x_in, "x", [&]<class T>(T) {
    using A = Acc<T>;
    std::vector<A> partial(blocks.count * blocks.per_run * width);
    T *to = mutable_data<T>(dx), *to_gate = mutable_data<T>(dgate);
    blocks.for_each(width, [&](int64_t i, int64_t m, int64_t first, int64_t last) {
      A* sum = partial.data() + i * width;
      for (int64_t r = first; r < last; ++r) {
        const T *in = x.at<T>(r), *grad = dy.at<T>(r), *g = gate.at<T>(m);
        for_vectors<A>(width, [&](int64_t j, auto n) {
          const Vec<A> d = load(grad + j, n);
          store(to + r * width + j, d * load(g + j, n), n);
          store(sum + j, load(sum + j, n) + d * load(in + j, n), n);
        });
      }
    });
    torch::stable::parallel_for(
        0, count, grain_of(blocks.per_run * width), [&](int64_t begin, int64_t end) {
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

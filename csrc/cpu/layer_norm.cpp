// The adaLN chain of a diffusion transformer: residual + gate * x, its LayerNorm or RMSNorm, and
// the modulation by scale and shift, each alone or together; and the derivative of all of it.
//
// Rows of the modulation serve runs of `run` neighbouring rows of x. A row is looked at several
// times, all but the first in the L1 cache. Backward finds the statistics anew, so that forward
// has nothing to save beside its input.
#include "rows.h"
#include "sums.h"
#include "two_vectors.h"

namespace aigc_fast {
namespace {

// Rows whose sums for scale, shift and gate are added before they meet those of other rows; the
// blocks depend on the shape alone, so that sums come out the same for any number of threads.
constexpr int64_t kMaxBlocks = 64, kMinBlockRows = 4;

// A row for every row of the modulation: that of a tensor, or one constant row.
Rows modulation_rows(const MaybeTensor& p, const Tensor& x, int64_t count, double missing) {
  if (p) return as_rows(*p);
  const int64_t width = x.size(x.dim() - 1);
  Tensor row = empty({width}, x.scalar_type());
  dispatch(x, "x", [&]<class T>(T) {
    for (int64_t i = 0; i < width; ++i) store_one(mutable_data<T>(row) + i, Acc<T>(missing));
  });
  return {row, count, width, 0};
}

// How many rows the modulation has; 1 where there is none.
int64_t count_modulation(const Tensor& x, std::initializer_list<const MaybeTensor*> all) {
  require(x.dim() > 0, "x must have at least 1 dimension");
  const int64_t width = x.size(x.dim() - 1);
  const Tensor* first = nullptr;
  for (const MaybeTensor* p : all) {
    if (!*p) continue;
    if (!first) first = &**p;
    require(same_shape(**p, *first) && (*p)->scalar_type() == x.scalar_type(),
            "scale, shift and gate must have one shape and the dtype of x");
  }
  if (!first) return 1;
  require(x.dim() > 1 && (first->dim() == 2 || first->dim() == 3), "wrong number of dimensions");
  require(first->size(0) == x.size(0) && first->size(first->dim() - 1) == width,
          "scale, shift and gate must have the batch and width of x");
  int64_t tokens = 1;
  for (int64_t d = 1; d + 1 < x.dim(); ++d) tokens *= x.size(d);
  const int64_t frames = first->dim() == 3 ? first->size(1) : 1;
  require(frames == tokens || (frames > 0 && tokens % frames == 0), "frames must divide tokens");
  return x.size(0) * frames;
}

void check_affine(const MaybeTensor& p, const Tensor& x) {
  require(!p || (p->dim() == 1 && p->size(0) == x.size(x.dim() - 1) &&
                 p->scalar_type() == x.scalar_type()),
          "weight and bias must have the width and dtype of x");
}

// Mean and 1 / deviation of a row, and the sums over it that f(differences from the mean, other
// vectors, sums) adds to; f takes rows of `more`. Two looks: the mean's rounding is made good with
// the sum of the differences from it.
template <class A, int N>
struct Statistics {
  A mean, factor, rest;
  std::array<A, N + 2> sums;
};
template <class T, bool rms, int N, int X, class F>
AIGC_INLINE Statistics<Acc<T>, N> statistics(std::array<const T*, X> x, int64_t width, double eps,
                                             F&& f) {
  using A = Acc<T>;
  A mean = 0;
  if constexpr (!rms)
    mean = sum_row<T, 1, 1>(width, {x[0]}, 0, [](auto& v, Vec<A>* s) { s[0] += v[0]; })[0] / width;
  // Past the end of the row everything is the mean: no difference, and f must add nothing for it.
  const auto sums = sum_row<T, N + 2, X>(width, x, mean, [&](auto& v, Vec<A>* s) {
    const Vec<A> d = rms ? v[0] : v[0] - mean;
    if constexpr (!rms) s[0] += d;
    s[1] += d * d;
    f(d, v, s + 2);
  });
  const A rest = sums[0] / width;
  const A variance = sums[1] / width - rest * rest;
  return {mean + rest, 1 / std::sqrt(variance + A(eps)), rest, sums};
}

template <class F>
void with_flags(bool a, bool b, F&& f) {
  a ? (b ? f.template operator()<true, true>() : f.template operator()<true, false>())
    : (b ? f.template operator()<false, true>() : f.template operator()<false, false>());
}

// (modulated norm of h, h) with h = x, or h = residual + gate * x.
std::tuple<Tensor, Tensor> forward(const MaybeTensor& residual_in, const Tensor& x_in,
                                   const MaybeTensor& gate_in, const MaybeTensor& scale_in,
                                   const MaybeTensor& shift_in, const MaybeTensor& weight,
                                   const MaybeTensor& bias, double eps, bool rms) {
  const int64_t count = count_modulation(x_in, {&gate_in, &scale_in, &shift_in});
  check_affine(weight, x_in);
  check_affine(bias, x_in);
  if (residual_in) check_like(*residual_in, x_in, "residual");
  const Rows x = as_rows(x_in), residual = residual_in ? as_rows(*residual_in) : x;
  const Rows gate = modulation_rows(gate_in, x_in, count, 0);
  const Rows scale = modulation_rows(scale_in, x_in, count, 0);
  const Rows shift = modulation_rows(shift_in, x_in, count, 0);
  const Rows w = modulation_rows(weight, x_in, 1, 1), b = modulation_rows(bias, x_in, 1, 0);
  const bool gated = gate_in.has_value();
  Tensor y = empty_like_rows(x_in), h = gated ? empty_like_rows(x_in) : y;
  const int64_t width = x.width, run = x.count / std::max<int64_t>(1, count);
  dispatch(x_in, "x", [&]<class T>(T) {
    with_flags(rms, weight || bias, [&]<bool is_rms, bool affine>() {
      torch::stable::parallel_for(0, x.count, grain_of(width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const T* in = x.at<T>(r);
          const int64_t m = r / run;
          if (gated) {
            T* to = mutable_data<T>(h) + r * width;
            map_row<T, 3>(width, {residual.at<T>(r), in, gate.at<T>(m)}, to,
                          [](auto& v) { return v[0] + v[1] * v[2]; });
            in = to;
          }
          const auto of = statistics<T, is_rms, 0, 1>({in}, width, eps, [](auto...) {});
          T* out = mutable_data<T>(y) + r * width;
          if (affine && !scale_in)
            map_row<T, 3>(width, {in, w.at<T>(0), b.at<T>(0)}, out,
                          [mean = of.mean, factor = of.factor](auto& v) {
                            return (v[0] - mean) * factor * v[1] + v[2];
                          });
          else if constexpr (affine)
            map_row<T, 5>(width, {in, scale.at<T>(m), shift.at<T>(m), w.at<T>(0), b.at<T>(0)}, out,
                          [mean = of.mean, factor = of.factor](auto& v) {
                            const auto n = (v[0] - mean) * factor * v[3] + v[4];
                            return n + n * v[1] + v[2];
                          });
          else
            map_row<T, 3>(width, {in, scale.at<T>(m), shift.at<T>(m)}, out,
                          [mean = of.mean, factor = of.factor](auto& v) {
                            const auto n = (v[0] - mean) * factor;
                            return n + n * v[1] + v[2];
                          });
        }
      });
    });
  });
  return {y, h};
}

Tensor modulated_norm(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& shift,
                      const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool rms) {
  return std::get<0>(forward({}, x, {}, scale, shift, weight, bias, eps, rms));
}
std::tuple<Tensor, Tensor> gated_residual_norm(const Tensor& residual, const Tensor& x,
                                               const Tensor& gate, const Tensor& scale,
                                               const Tensor& shift, const MaybeTensor& weight,
                                               const MaybeTensor& bias, double eps, bool rms) {
  return forward(residual, x, gate, scale, shift, weight, bias, eps, rms);
}

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

Tensor gated_residual(const Tensor& residual_in, const Tensor& x_in, const Tensor& gate_in) {
  const MaybeTensor maybe = gate_in;
  const int64_t count = count_modulation(x_in, {&maybe});
  check_like(residual_in, x_in, "residual");
  const Rows x = as_rows(x_in), residual = as_rows(residual_in), gate = as_rows(gate_in);
  Tensor y = empty_like_rows(x_in);
  const int64_t run = x.count / std::max<int64_t>(1, count);
  dispatch(x_in, "x", [&]<class T>(T) {
    torch::stable::parallel_for(0, x.count, grain_of(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        map_row<T, 3>(x.width, {residual.at<T>(r), x.at<T>(r), gate.at<T>(r / run)},
                      mutable_data<T>(y) + r * x.width, [](auto& v) { return v[0] + v[1] * v[2]; });
    });
  });
  return y;
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
  m.impl("modulated_norm", TORCH_BOX(&modulated_norm));
  m.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward));
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("gated_residual_norm", TORCH_BOX(&gated_residual_norm));
}

}  // namespace
}  // namespace aigc_fast

// y = clamp(gain * act(x + bias), -limit, limit), its backward and double backward.
//
// A dense tensor is walked in memory order whatever the order of its dimensions: with the bias
// dimension at stride `inner`, element i has channel (i / inner) % channels. So contiguous and
// channels_last are one case each: rows of `inner` elements that share a bias value, or (inner
// == 1) rows of `channels` elements with one value each.
#include "act_dispatch.h"
#include "clamp.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Elements per block of work. Fixed, so that sums come out the same for any number of threads.
constexpr int64_t kBlock = 16384;

struct Layout {
  int64_t size, channels, inner;
};

Layout layout_of(const Tensor& x, const MaybeTensor& bias, int64_t dim) {
  const int64_t size = x.numel();
  if (!bias) return {size, 1, size};
  require(dim >= 0 && dim < x.dim(), "dim must be in [0, ", x.dim(), "), got ", dim);
  const int64_t channels = x.size(dim);
  require(bias->dim() == 1 && bias->size(0) == channels, "bias must have shape (", channels, ",)");
  require(bias->scalar_type() == x.scalar_type(), "bias must have the dtype of x");
  // The stride of a dimension of one element says nothing.
  return {size, channels, channels == 1 ? size : x.stride(dim)};
}

// Calls f(i, lanes, bias) for every vector of elements i, i + 1, ... in parallel. If `bias_grad`
// is given, it receives the sums over each channel of what f returns (zero in unused lanes);
// without `sums` it is not.
template <class T, bool sums, class F>
void for_elements(Layout l, const T* bias, T* bias_grad, F f) {
  using A = Acc<T>;
  if (l.size == 0) {
    if (bias_grad) std::memset(static_cast<void*>(bias_grad), 0, l.channels * sizeof(T));
    return;
  }
  std::vector<double> partial;  // [block][channel]
  std::vector<double> totals(bias_grad ? l.channels : 0);
  if (bias && l.inner == 1) {
    const int64_t rows = l.size / l.channels;
    const int64_t block = std::max<int64_t>(1, kBlock / l.channels);
    const int64_t blocks = (rows + block - 1) / block;
    if (bias_grad) partial.resize(blocks * l.channels);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * block; r < std::min(rows, end * block); ++r) {
        double* to = bias_grad ? partial.data() + r / block * l.channels : nullptr;
        for_vectors<A>(l.channels, [&](int64_t j, auto lanes) {
          const Vec<A> v = f(r * l.channels + j, lanes, load(bias + j, lanes));
          if (sums && to) add_to(to + j, widen<A>(v), lanes);
        });
      }
    });
    // No remainder finds the channel, here and below: a division takes 20 cycles.
    for (auto part = partial.begin(); part != partial.end();)
      for (double& total : totals) total += *part++;
  } else {
    const int64_t rows = l.size / l.inner, pieces = (l.inner + kBlock - 1) / kBlock;
    if (bias_grad) partial.resize(rows * pieces);
    torch::stable::parallel_for(
        0, rows * pieces, grain_of(l.inner), [&](int64_t begin, int64_t end) {
          for (int64_t u = begin; u < end; ++u) {
            const int64_t row = u / pieces, start = u % pieces * kBlock;
            const Vec<A> b = bias ? broadcast(load_one(bias + row % l.channels)) : Vec<A>{};
            Wide<A> sum;
            // Four terms meet in fp32, which costs the sum no digit that its terms have.
            Vec<A> chain = {};
            int terms = 0;
            for_vectors<A>(std::min(kBlock, l.inner - start), [&](int64_t j, auto lanes) {
              const Vec<A> v = f(row * l.inner + start + j, lanes, b);
              if (!sums) return;
              chain += v;
              if (++terms % 4 == 0) sum += widen<A>(std::exchange(chain, Vec<A>{}));
            });
            if (sums) sum += widen<A>(chain);
            if (bias_grad) partial[u] = sum.sum();
          }
        });
    for (auto part = partial.begin(); part != partial.end();)
      for (double& total : totals)
        for (int64_t p = 0; p < pieces; ++p) total += *part++;
  }
  const std::vector<A> narrow(totals.begin(), totals.end());
  convert(narrow.data(), narrow.size(), bias_grad);
}

template <class A>
struct Params {
  A alpha, gain, limit;
};

// Where |y| passes the limit the derivative is zero. `saved` is y itself (whose values at the
// limit were clamped) or x + bias.
template <Act act, class A>
AIGC_INLINE Vec<A> derivative(Vec<A> saved, bool from_output, Params<A> p) {
  const Vec<A> zero = {};
  if (from_output) {
    const Vec<A> d = slope<act, A>(saved, p.alpha) * p.gain;
    return abs<A>(saved) >= p.limit ? zero : d;
  }
  const Vec<A> y = activate<act, A>(saved, p.alpha) * p.gain;
  return abs<A>(y) > p.limit ? zero : slope<act, A>(saved, p.alpha) * p.gain;
}

Tensor bias_act(const Tensor& x_in, const MaybeTensor& bias_in, int64_t act, int64_t dim,
                double gain, std::optional<double> clamp, double alpha) {
  const Tensor x = as_dense(x_in);
  const Layout l = layout_of(x, bias_in, dim);
  Tensor y = empty_like_dense(x);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Params<A> p{A(alpha), A(gain), limit_of<A>(clamp)};
    MaybeTensor bias;
    if (bias_in) bias = as_contiguous(*bias_in);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) {
      for_elements<T, false>(l, bias ? data<T>(*bias) : nullptr, nullptr,
                             [=](int64_t i, auto lanes, Vec<A> b) {
                               Vec<A> v = activate<a, A>(load(in + i, lanes) + b, p.alpha) * p.gain;
                               v = clamp_to<A>(v, p.limit);
                               store(out + i, v, lanes);
                               return v;
                             });
    });
  });
  return y;
}

// (dx, dbias): dx = dy * dy/dx; dbias = dx summed over all dimensions but `dim`, or empty.
std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& dy_in, const Tensor& saved_in,
                                             const MaybeTensor& bias_in, int64_t act, int64_t dim,
                                             double gain, std::optional<double> clamp, double alpha,
                                             bool from_output) {
  const Tensor saved = as_dense(saved_in);
  check_like(dy_in, saved, "grad_output");
  const Tensor dy = in_order_of(dy_in, saved);
  const Layout l = layout_of(saved, bias_in, dim);
  Tensor dx = empty_like_dense(saved);
  Tensor dbias = empty({bias_in ? l.channels : 0}, saved.scalar_type());
  dispatch(saved, "x", [&]<class T>(T) {
    using A = Acc<T>;
    // Clamped outputs hold the limit as T rounds it.
    T rounded;
    store_one(&rounded, limit_of<A>(clamp));
    const Params<A> p{A(alpha), A(gain), from_output ? load_one(&rounded) : limit_of<A>(clamp)};
    MaybeTensor bias;
    if (bias_in) bias = as_contiguous(*bias_in);
    const T *grad = data<T>(dy), *s = data<T>(saved);
    T* out = mutable_data<T>(dx);
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) {
      for_elements<T, true>(
          l, bias ? data<T>(*bias) : nullptr, bias ? mutable_data<T>(dbias) : nullptr,
          [=](int64_t i, auto lanes, Vec<A> b) {
            const Vec<A> at = load(s + i, lanes) + (from_output ? Vec<A>{} : b);
            const Vec<A> v = load(grad + i, lanes) * derivative<a, A>(at, from_output, p);
            store(out + i, v, lanes);
            return v;
          });
    });
  });
  return {dx, dbias};
}

// dx is linear in dy: the gradient of <gg, dx> is (gg * dy/dx, gg * dy * d2y/dx2, its bias sum).
std::tuple<Tensor, Tensor, Tensor> bias_act_double_backward(
    const Tensor& gg_in, const Tensor& dy_in, const Tensor& x_in, const MaybeTensor& bias_in,
    int64_t act, int64_t dim, double gain, std::optional<double> clamp, double alpha) {
  const Tensor x = as_dense(x_in);
  check_like(dy_in, x, "grad_output");
  check_like(gg_in, x, "grad_grad");
  const Tensor dy = in_order_of(dy_in, x), gg = in_order_of(gg_in, x);
  const Layout l = layout_of(x, bias_in, dim);
  Tensor grad_dy = empty_like_dense(x), grad_x = empty_like_dense(x);
  Tensor dbias = empty({bias_in ? l.channels : 0}, x.scalar_type());
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Params<A> p{A(alpha), A(gain), limit_of<A>(clamp)};
    MaybeTensor bias;
    if (bias_in) bias = as_contiguous(*bias_in);
    const T *grad = data<T>(dy), *v = data<T>(gg), *in = data<T>(x);
    T *out = mutable_data<T>(grad_dy), *out_x = mutable_data<T>(grad_x);
    with_act(act, [&]<Act a>(std::integral_constant<Act, a>) {
      for_elements<T, true>(l, bias ? data<T>(*bias) : nullptr,
                            bias ? mutable_data<T>(dbias) : nullptr,
                            [=](int64_t i, auto lanes, Vec<A> b) {
                              const Vec<A> at = load(in + i, lanes) + b, g = load(v + i, lanes);
                              store(out + i, g * derivative<a, A>(at, false, p), lanes);
                              const Vec<A> y = activate<a, A>(at, p.alpha) * p.gain;
                              Vec<A> second = curvature<a, A>(at, p.alpha) * p.gain;
                              second = abs<A>(y) > p.limit ? Vec<A>{} : second;
                              const Vec<A> result = g * load(grad + i, lanes) * second;
                              store(out_x + i, result, lanes);
                              return result;
                            });
    });
  });
  return {grad_dy, grad_x, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
  m.impl("bias_act_double_backward", TORCH_BOX(&bias_act_double_backward));
}

}  // namespace
}  // namespace aigc_fast

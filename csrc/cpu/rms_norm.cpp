// y = x / sqrt(mean(x^2) + eps) * weight along the last dimension, with or without a residual
// added first, and the derivative of both.
//
// A row is read twice, the second time from the cache. Backward finds the root mean square anew in
// the pass that it needs in any case, so that forward has nothing to save beside its input.
#include "rows.h"
#include "sums.h"
#include "two_vectors.h"

namespace aigc_fast {
namespace {

// Rows whose weight gradients are added before they meet those of other rows; the blocks depend
// on the shape alone, so that the sum comes out the same for any number of threads.
constexpr int64_t kMaxBlocks = 64, kMinBlockRows = 16;

void check(const Tensor& x, const Tensor& weight) {
  require(x.dim() > 0, "x must have at least 1 dimension");
  require(weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), "weight must have shape (",
          x.size(x.dim() - 1), ",)");
  require(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
}

template <class T>
Acc<T> inverse_rms(Acc<T> sum_of_squares, int64_t width, double eps) {
  return 1 / std::sqrt(sum_of_squares / width + static_cast<Acc<T>>(eps));
}

template <class T>
Acc<T> sum_of_squares(const T* x, int64_t width) {
  const auto [sum] =
      sum_row<T, 1, 1>(width, {x}, 0, [](const auto& v, auto* sums) { sums[0] += v[0] * v[0]; });
  return sum;
}

template <class T>
void scale_row(const T* x, const T* weight, T* y, int64_t width, Acc<T> factor) {
  map_row<T, 2>(width, {x, weight}, y, [=](const auto& v) { return v[0] * factor * v[1]; });
}

Tensor rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps) {
  check(x_in, weight_in);
  const Rows x = as_rows(x_in);
  const Tensor weight = as_contiguous(weight_in);
  Tensor y = empty_like_rows(x_in);
  dispatch(x_in, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T* w = data<T>(weight);
    T* out = mutable_data<T>(y);
    torch::stable::parallel_for(0, x.count, grain_of(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* in = x.at<T>(r);
        const A factor = inverse_rms<T>(sum_of_squares(in, x.width), x.width, eps);
        scale_row(in, w, out + r * x.width, x.width, factor);
      }
    });
  });
  return y;
}

// (rms_norm(x + residual), x + residual)
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_in, const Tensor& residual_in,
                                        const Tensor& weight_in, double eps) {
  check(x_in, weight_in);
  check_like(residual_in, x_in, "residual");
  const Rows x = as_rows(x_in), residual = as_rows(residual_in);
  const Tensor weight = as_contiguous(weight_in);
  Tensor y = empty_like_rows(x_in), sum = empty_like_rows(x_in);
  dispatch(x_in, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T* w = data<T>(weight);
    T *out = mutable_data<T>(y), *sum_out = mutable_data<T>(sum);
    torch::stable::parallel_for(0, x.count, grain_of(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *a = x.at<T>(r), *b = residual.at<T>(r);
        T* h = sum_out + r * x.width;
        map_row<T, 2>(x.width, {a, b}, h, [](const auto& v) { return v[0] + v[1]; });
        const A factor = inverse_rms<T>(sum_of_squares(h, x.width), x.width, eps);  // as T rounds h
        scale_row(h, w, out + r * x.width, x.width, factor);
      }
    });
  });
  return {y, sum};
}

// With n = x / rms(x) and g = dy * weight:
//   dx = (g - n * mean(g * n)) / rms(x) + what arrives for x itself (new_residual of add_rms_norm)
//   dweight = sum over rows of dy * n, or empty where it is not asked for
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_in, const MaybeTensor& dsum_in,
                                             const Tensor& x_in, const Tensor& weight_in,
                                             double eps, bool weight_grad) {
  check(x_in, weight_in);
  check_like(dy_in, x_in, "grad_output");
  if (dsum_in) check_like(*dsum_in, x_in, "grad_residual");
  const Rows x = as_rows(x_in), dy = as_rows(dy_in);
  const Rows dsum = dsum_in ? as_rows(*dsum_in) : Rows{dy.tensor, 0, 0, 0};
  const Tensor weight = as_contiguous(weight_in);
  const int64_t width = x.width;
  const int64_t block = std::max(kMinBlockRows, (x.count + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (x.count + block - 1) / block;
  Tensor dx = empty_like_rows(x_in), dweight = empty({weight_grad ? width : 0}, x_in.scalar_type());
  dispatch(x_in, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T* w = data<T>(weight);
    T* out = mutable_data<T>(dx);
    std::vector<A> partial(weight_grad ? blocks * width : 0);
    const int64_t grain = grain_of(width * block);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * block; r < std::min(x.count, end * block); ++r) {
        const T *in = x.at<T>(r), *grad = dy.at<T>(r), *added = dsum_in ? dsum.at<T>(r) : nullptr;
        T* dx_row = out + r * width;
        A* sum = weight_grad ? partial.data() + r / block * width : nullptr;
        const auto [squares, products] =
            sums_over<A, 2>(width, [&](int64_t i, auto lanes, Vec<A>* sums) {
              const Vec<A> v = load(in + i, lanes);
              sums[0] += v * v;
              sums[1] += v * (load(grad + i, lanes) * load(w + i, lanes));
            });
        const A factor = inverse_rms<T>(squares, width, eps);
        const A mean = products * factor / width;  // of g * n
        for_vectors<A>(width, [&](int64_t i, auto lanes) {
          const Vec<A> n = load(in + i, lanes) * factor, g = load(grad + i, lanes);
          Vec<A> v = (g * load(w + i, lanes) - n * mean) * factor;
          if (added) v += load(added + i, lanes);
          if (sum) store(sum + i, load(sum + i, lanes) + g * n, lanes);
          store(dx_row + i, v, lanes);
        });
      }
    });
    if (weight_grad)
      add_partial_sums(partial.data(), blocks, width, width, mutable_data<T>(dweight));
  });
  return {dx, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace
}  // namespace aigc_fast

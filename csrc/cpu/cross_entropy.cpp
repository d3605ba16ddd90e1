// The cross-entropy of rows of logits, and its gradient.
//
// A row is read twice, for its largest logit and for the sum of exponentials; the second time it
// comes from the cache.
#include "rows.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Logits whose sums meet before they join the others, in fp64.
constexpr int64_t kPart = 4096;

struct LossOptions {
  int64_t ignore_index;
  double smoothing, softcap, z_loss;  // a softcap of 0 is none

  void check() const {
    require(smoothing >= 0 && smoothing <= 1, "label_smoothing must be in [0, 1]");
    require(std::isfinite(softcap) && softcap >= 0, "softcap must be positive");
    require(std::isfinite(z_loss), "z_loss must be finite");
  }
};

struct RowsWithTargets {
  Rows logits;
  Tensor target;

  RowsWithTargets(const Tensor& logits_in, const Tensor& target_in, const LossOptions& options)
      : logits(rows_of(logits_in)), target(target_in) {
    options.check();
    require(target_in.scalar_type() == ScalarType::Long, "target must be int64");
    const auto sizes = logits_in.sizes(), expected = target_in.sizes();
    require(std::equal(sizes.begin(), sizes.end() - 1, expected.begin(), expected.end()),
            "target must have the shape of input without its last dimension");
    target = as_contiguous(target_in);
    for (int64_t row = 0; row < logits.count; ++row) {
      const int64_t t = data<int64_t>(target)[row];
      require(t == options.ignore_index || (t >= 0 && t < logits.width), "target must be in [0, ",
              logits.width, ") or ignore_index");
    }
  }

  // f(row, target) for every row, in parallel.
  template <class F>
  void for_each(F f) const {
    in_parallel(logits.count, logits.width,
                [&](int64_t row) { f(row, data<int64_t>(target)[row]); });
  }

 private:
  static Rows rows_of(const Tensor& logits) {
    require(logits.dim() > 0 && logits.sizes().back() > 0, "input must have at least one class");
    return as_rows(logits);
  }
};

// softcap * tanh(x / softcap), or x.
template <bool capped, class A>
AIGC_INLINE Vec<A> cap(Vec<A> x, A softcap) {
  if constexpr (!capped) return x;
  return tanh<A>(x / softcap) * softcap;
}

template <class T>
Acc<T> largest(const T* x, int64_t width) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  Vec<A> top = broadcast(-std::numeric_limits<A>::infinity()), other = top;
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    top = max<A>(top, load(x + i));
    other = max<A>(other, load(x + i + lanes));
  }
  top = max<A>(top, other);
  for (; i < width; ++i) top = max<A>(top, broadcast(load_one(x + i)));
  A result = top[0];
  for (int lane = 1; lane < lanes; ++lane) result = std::max(result, A(top[lane]));
  return result;
}

// (loss, log of the sum of exponentials) of one row.
template <bool capped, class T>
std::pair<double, double> row_loss(const T* x, int64_t width, int64_t target,
                                   const LossOptions& options) {
  using A = Acc<T>;
  const A softcap = A(options.softcap);
  A top = cap<capped, A>(broadcast(largest(x, width)), softcap)[0];
  if (std::isinf(top)) top = 0;  // infinite differences would be NaN
  double exponentials = 0, logits = 0;
  for (int64_t start = 0; start < width; start += kPart) {
    const auto part =
        sums_over<A, 2>(std::min(kPart, width - start), [&](int64_t i, auto lanes, Vec<A>* sums) {
          const Vec<A> logit = cap<capped, A>(load(x + start + i, lanes), softcap);
          sums[0] += only<A>(exp<A>(logit - top), lanes);
          sums[1] += logit;  // zero beyond the row
        });
    exponentials += part[0];
    logits += part[1];
  }
  const double lse = top + std::log(exponentials);
  if (target == options.ignore_index) return {0, lse};
  const double chosen = cap<capped, A>(broadcast(load_one(x + target)), softcap)[0];
  double loss = lse - chosen;
  // Products with zero would make NaN of infinite logits.
  if (options.smoothing != 0) loss += options.smoothing * (chosen - logits / width);
  if (options.z_loss != 0) loss += options.z_loss * lse * lse;
  return {loss, lse};
}

template <bool capped, class T, class A = Acc<T>>
void row_gradient(const T* x, int64_t width, int64_t target, A grad, A lse,
                  const LossOptions& options, T* to) {
  if (target == options.ignore_index) {
    std::memset(static_cast<void*>(to), 0, width * sizeof(T));
    return;
  }
  const A softcap = A(options.softcap), scale = grad * (1 + 2 * A(options.z_loss) * lse);
  const A uniform = grad * A(options.smoothing / width);
  const auto gradient = [=](Vec<A> raw, A chosen) {
    const Vec<A> logit = cap<capped, A>(raw, softcap);
    const Vec<A> g = exp<A>(logit - lse) * scale - (uniform + chosen);
    if constexpr (!capped) return g;
    const Vec<A> share = logit / softcap;
    return g * (1 - share * share);
  };
  // Before `to`, which may be x, is written.
  const Vec<A> of_target =
      gradient(broadcast(load_one(x + target)), grad * A(1 - options.smoothing));
  for_vectors<A>(width, [&](int64_t i, auto lanes) {
    store(to + i, gradient(load(x + i, lanes), A(0)), lanes);
  });
  store_one(to + target, of_target[0]);
}

template <class F>
void with_softcap(double softcap, F f) {
  softcap == 0 ? f(std::false_type{}) : f(std::true_type{});
}

// (losses, log-sum-exps), both of the target's shape.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                         int64_t ignore_index, double smoothing, double softcap,
                                         double z_loss) {
  const LossOptions options{ignore_index, smoothing, softcap, z_loss};
  const RowsWithTargets rows(logits, target, options);
  const auto sizes = target.sizes();
  Tensor losses = empty({sizes.begin(), sizes.end()}, acc_dtype(logits));
  Tensor lses = empty_like_dense(losses);
  dispatch(logits, "input", [&]<class T>(T) {
    using A = Acc<T>;
    A *to_loss = mutable_data<A>(losses), *to_lse = mutable_data<A>(lses);
    with_softcap(softcap, [&]<bool capped>(std::bool_constant<capped>) {
      rows.for_each([&](int64_t row, int64_t t) {
        const auto [loss, lse] =
            row_loss<capped>(rows.logits.at<T>(row), rows.logits.width, t, options);
        to_loss[row] = A(loss);
        to_lse[row] = A(lse);
      });
    });
  });
  return {losses, lses};
}

void write_gradient(const Tensor& grad, const RowsWithTargets& rows, const Tensor& lse,
                    const LossOptions& options, const Tensor& out) {
  for (const Tensor* x : {&grad, &lse})
    require(same_shape(*x, rows.target) && x->scalar_type() == acc_dtype(out),
            "grad_losses and lse must have the shape of target and be float32, or float64 for "
            "float64");
  const Tensor grads = as_contiguous(grad), lses = as_contiguous(lse);
  dispatch(out, "input", [&]<class T>(T) {
    using A = Acc<T>;
    with_softcap(options.softcap, [&]<bool capped>(std::bool_constant<capped>) {
      rows.for_each([&](int64_t row, int64_t t) {
        row_gradient<capped, T>(rows.logits.at<T>(row), rows.logits.width, t, data<A>(grads)[row],
                                data<A>(lses)[row], options,
                                mutable_data<T>(out) + row * rows.logits.width);
      });
    });
  });
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                              const Tensor& lse, int64_t ignore_index, double smoothing,
                              double softcap, double z_loss) {
  const LossOptions options{ignore_index, smoothing, softcap, z_loss};
  const RowsWithTargets rows(logits, target, options);
  const Tensor out = empty_like_rows(logits);
  write_gradient(grad, rows, lse, options, out);
  return out;
}

// The gradient takes the place of the logits.
void cross_entropy_backward_(const Tensor& grad, const Tensor& logits, const Tensor& target,
                             const Tensor& lse, int64_t ignore_index, double smoothing,
                             double softcap, double z_loss) {
  require(logits.is_contiguous(), "logits must be contiguous");
  const LossOptions options{ignore_index, smoothing, softcap, z_loss};
  write_gradient(grad, RowsWithTargets(logits, target, options), lse, options, logits);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_));
}

}  // namespace
}  // namespace aigc_fast

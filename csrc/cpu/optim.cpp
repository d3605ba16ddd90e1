// Adam with clipping, averaged weights and a guard, for all tensors of a model in one parallel
// region, and the norm of all their gradients in another.
#include "sums.h"
#include "tensor.h"

namespace aigc_fast {
namespace {

// Elements of a tensor that are one unit of work; fixed, so that sums do not depend on threads.
constexpr int64_t kUnit = 4096;

// Calls f(tensor, begin, end, unit) for pieces of all tensors in parallel.
template <class F>
void for_units(const std::vector<Tensor>& tensors, F f) {
  std::vector<int64_t> first{0};  // unit of each tensor
  for (const Tensor& t : tensors) first.push_back(first.back() + (t.numel() + kUnit - 1) / kUnit);
  torch::stable::parallel_for(0, first.back(), grain_of(kUnit), [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (unit >= first[t + 1]) ++t;
      const int64_t start = (unit - first[t]) * kUnit;
      f(t, start, std::min(tensors[t].numel(), start + kUnit), unit);
    }
  });
}

int64_t units_of(const std::vector<Tensor>& tensors) {
  int64_t units = 0;
  for (const Tensor& t : tensors) units += (t.numel() + kUnit - 1) / kUnit;
  return units;
}

void require_dtype(const Tensor& x, const Tensor& like, const char* name) {
  require(x.scalar_type() == like.scalar_type(), name, " must have the dtype of the first tensor");
}

// Scalars and rates may have any floating dtype.
double scalar_of(const Tensor& x, const char* name) {
  require(x.numel() == 1, name, " must be a scalar");
  return number_at(x, 0, name);
}

// One more; the new number.
double count_up(const Tensor& x, const char* name) {
  const double value = scalar_of(x, name) + 1;
  set_number(x, 0, value);
  return value;
}

Tensor gradient_norm(const std::vector<Tensor>& grads_in, const MaybeTensor& loss) {
  require(!grads_in.empty(), "grads must hold at least one tensor");
  std::vector<Tensor> grads;
  for (const Tensor& g : grads_in) {
    require_dtype(g, grads_in[0], "grads");
    grads.push_back(as_dense(g));
  }
  std::vector<double> parts(units_of(grads));
  double norm = 0;
  dispatch(grads[0], "grads", [&]<class T>(T) {
    using A = Acc<T>;
    for_units(grads, [&](size_t t, int64_t begin, int64_t end, int64_t unit) {
      const T* g = data<T>(grads[t]) + begin;
      const auto [sum] = sums_over<A, 1>(end - begin, [&](int64_t i, auto lanes, Vec<A>* sums) {
        const Vec<A> v = load(g + i, lanes);
        sums[0] += v * v;
      });
      parts[unit] = sum;
    });
    for (double part : parts) norm += part;
    norm = std::sqrt(norm);
  });
  if (loss && !std::isfinite(scalar_of(*loss, "loss"))) norm = NAN;
  Tensor out = empty({}, acc_dtype(grads[0]));
  set_number(out, 0, norm);
  return out;
}

// Tensors to be changed in place, in memory orders that suit the kernel; where that takes copies,
// write_back() copies the results to where they belong.
class InPlace {
 public:
  // In the order of `like`; without it, dense in whatever order.
  InPlace(const std::vector<Tensor>& tensors, const std::vector<Tensor>* like = nullptr)
      : theirs_(tensors) {
    for (size_t i = 0; i < tensors.size(); ++i)
      ours.push_back(like ? in_order_of(tensors[i], (*like)[i]) : as_dense(tensors[i]));
  }
  void write_back() {
    for (size_t i = 0; i < ours.size(); ++i)
      if (ours[i].const_data_ptr() != theirs_[i].const_data_ptr())
        torch::stable::copy_(theirs_[i], ours[i]);
  }

  std::vector<Tensor> ours;

 private:
  std::vector<Tensor> theirs_;
};

void check_lists(const std::vector<Tensor>& params,
                 std::initializer_list<const std::vector<Tensor>*> lists,
                 const std::vector<Tensor>& steps) {
  const size_t count = params.size();
  for (const auto* list : lists) {
    require(list->size() == count, "every list must be as long as params");
    for (size_t i = 0; i < count; ++i) {
      require(same_shape((*list)[i], params[i]), "every tensor must have its param's shape");
      require_dtype((*list)[i], params[0], "every tensor");
    }
  }
  require(steps.size() == count, "steps must be as long as params");
  for (size_t i = 0; i < count; ++i) {
    require_dtype(params[i], params[0], "params");
    scalar_of(steps[i], "steps");  // refuses what is none, before anything is written
  }
}

void adam_step(const std::vector<Tensor>& params_in, const std::vector<Tensor>& grads_in,
               const std::vector<Tensor>& exp_avgs_in, const std::vector<Tensor>& exp_avg_sqs_in,
               const std::vector<Tensor>& steps, const std::vector<Tensor>& averages_in,
               const MaybeTensor& norm, MaybeTensor skipped, double lr, double beta1, double beta2,
               double eps, double weight_decay, bool decoupled, double ema_decay,
               std::optional<double> max_norm, const MaybeTensor& rates) {
  const size_t count = params_in.size();
  if (count == 0) return;
  const bool averaged = !averages_in.empty();
  check_lists(params_in,
              {&grads_in, &exp_avgs_in, &exp_avg_sqs_in, averaged ? &averages_in : &params_in},
              steps);
  if (rates) {
    require(rates->dim() == 1 && rates->numel() == 2, "rates must have shape (2,)");
    lr = number_at(*rates, 0, "rates");
    ema_decay = number_at(*rates, rates->stride(0), "rates");
  }
  double clip = 1;
  if (norm) {
    const double value = scalar_of(*norm, "norm");
    if (!std::isfinite(value)) {
      if (skipped) count_up(*skipped, "skipped");
      return;
    }
    if (max_norm) clip = std::min(1.0, *max_norm / (value + 1e-6));
  }

  InPlace params(params_in);
  InPlace exp_avgs(exp_avgs_in, &params.ours), exp_avg_sqs(exp_avg_sqs_in, &params.ours);
  InPlace averages(averages_in, averaged ? &params.ours : nullptr);
  std::vector<Tensor> grads;
  std::vector<double> sizes, corrections;
  for (size_t i = 0; i < count; ++i) {
    grads.push_back(in_order_of(grads_in[i], params.ours[i]));
    const double step = count_up(steps[i], "steps");
    sizes.push_back(lr / (1 - std::pow(beta1, step)));
    corrections.push_back(1 / std::sqrt(1 - std::pow(beta2, step)));
  }
  dispatch(params_in[0], "params", [&]<class T>(T) {
    using A = Acc<T>;
    const A keep = decoupled ? A(1 - lr * weight_decay) : A(1),
            added = decoupled ? A(0) : A(weight_decay);
    const A of_grad = A(clip), toward = A(1 - beta1), old = A(beta2), of_square = A(1 - beta2);
    const A epsilon = A(eps), average_toward = A(1 - ema_decay);
    for_units(params.ours, [&](size_t t, int64_t begin, int64_t end, int64_t) {
      T* param = mutable_data<T>(params.ours[t]) + begin;
      T* exp_avg = mutable_data<T>(exp_avgs.ours[t]) + begin;
      T* exp_avg_sq = mutable_data<T>(exp_avg_sqs.ours[t]) + begin;
      T* average = averaged ? mutable_data<T>(averages.ours[t]) + begin : nullptr;
      const T* grad = data<T>(grads[t]) + begin;
      const A size = A(sizes[t]), correction = A(corrections[t]);
      for_vectors<A>(end - begin, [=](int64_t i, auto lanes) {
        Vec<A> p = load(param + i, lanes), m = load(exp_avg + i, lanes);
        const Vec<A> g = load(grad + i, lanes) * of_grad + p * added;
        m += (g - m) * toward;
        const Vec<A> v = load(exp_avg_sq + i, lanes) * old + g * g * of_square;
        p = p * keep - m * size / (sqrt<A>(v) * correction + epsilon);
        store(exp_avg + i, m, lanes);
        store(exp_avg_sq + i, v, lanes);
        store(param + i, p, lanes);
        if (average) {
          const Vec<A> a = load(average + i, lanes);
          store(average + i, a + (p - a) * average_toward, lanes);
        }
      });
    });
  });
  for (InPlace* tensors : {&params, &exp_avgs, &exp_avg_sqs, &averages}) tensors->write_back();
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm));
  m.impl("adam_step", TORCH_BOX(&adam_step));
}

}  // namespace
}  // namespace aigc_fast

// A call of scheduler_step: the rows of its coefficients, and what forward and backward require.
#pragma once

#include "clamp.h"
#include "per_sample.h"

namespace aigc_fast {

constexpr int kMaxHistory = 5, kMaxExtras = 1 + kMaxHistory;  // noise and history

// The factors of x0, the sample, m, the noise (if there is noise) and the history.
template <class A>
struct Combination {
  A x0 = 0, sample = 0, output = 0, extra[kMaxExtras] = {};

  template <class F>
  void read(F at, int64_t begin, int64_t end, bool has_noise) {
    x0 = at(begin), sample = at(begin + 1), output = at(begin + 2);
    for (int64_t i = begin + (has_noise ? 3 : 4), e = 0; i < end; ++i) extra[e++] = at(i);
  }
};

// A row (A, B, r, P, Q, R, N, H_1, ..., H_k) of the coefficients, and (P, Q, R, N, H_1, ..., H_k)
// of the second result.
template <class A>
struct StepRow {
  A x0_sample, x0_output, clip;
  Combination<A> prev, second;

  StepRow(const Scalars& table, int64_t columns, int64_t num_history, int64_t row, bool has_noise) {
    // NaN without payload, of which store_two might make a number.
    const auto at = [&](int64_t i) {
      const A a = A(table[row * columns + i]);
      return std::isnan(a) ? std::numeric_limits<A>::quiet_NaN() : a;
    };
    x0_sample = at(0), x0_output = at(1), clip = at(2);
    const int64_t end = 7 + num_history;
    prev.read(at, 3, end, has_noise);
    if (columns > end) second.read(at, end, columns, has_noise);
  }
};

struct SchedulerCall {
  const Tensor &sample, &output, &coefficients;
  const MaybeTensor& uncond;
  double scale;
  bool per_sample, has_second;
  int64_t columns;

  SchedulerCall(const Tensor& sample, const Tensor& output, const Tensor& coefficients,
                const MaybeTensor& uncond, double scale, double rescale, int64_t num_history)
      : sample(sample), output(output), coefficients(coefficients), uncond(uncond), scale(scale) {
    check(output, "model_output");
    if (uncond) check(*uncond, "uncond_output");
    require(uncond || (scale == 1 && rescale == 0), "uncond_output must be given for guidance");
    const int64_t dim = coefficients.dim();
    require(num_history >= 0 && num_history <= kMaxHistory, "history must hold at most 5 tensors");
    require(dim == 1 || (dim == 2 && sample.dim() && coefficients.size(0) == sample.size(0)),
            "coefficients must be one row or one row for each sample");
    columns = coefficients.size(dim - 1);
    has_second = columns == 11 + 2 * num_history;
    require(has_second || columns == 7 + num_history,
            "coefficients must have 7 + len(history) columns, or 11 + 2 * len(history)");
    require(coefficients.scalar_type() == ScalarType::Float ||
                coefficients.scalar_type() == ScalarType::Double,
            "coefficients must be float32 or float64");
    require(rescale == 0 || sample.dim() > 1, "sample must have more than a batch dimension");
    per_sample = dim == 2;
  }
  // The rows of coefficients: one, or one for each sample.
  template <class A>
  std::vector<StepRow<A>> table(int64_t num_history, bool has_noise) const {
    const Scalars numbers(coefficients, "coefficients");
    std::vector<StepRow<A>> rows;
    for (int64_t i = 0; i < (per_sample ? coefficients.size(0) : 1); ++i)
      rows.emplace_back(numbers, columns, num_history, i, has_noise);
    return rows;
  }
  void check(const Tensor& x, const char* name) const { check_like(x, sample, name, "sample"); }
};

template <class A>
AIGC_INLINE Vec<A> guide(Vec<A> cond, Vec<A> uncond, A scale) {
  return uncond + (cond - uncond) * scale;
}

}  // namespace aigc_fast

// Sines and cosines of timesteps at dim / 2 frequencies, and the gradient of the timesteps.
//
// In double throughout: the angle of a timestep of 1000 keeps four digits in fp32, and a batch has
// a few thousand elements at most.
#include "per_sample.h"

namespace aigc_fast {
namespace {

struct Frequencies {
  std::vector<double> of;

  Frequencies(int64_t dim, double shift, double scale, double period) : of(dim / 2) {
    const double step = -std::log(period) / (dim / 2 - shift);
    for (size_t i = 0; i < of.size(); ++i) of[i] = scale * std::exp(step * i);
  }
};

void check(const Tensor& timesteps, int64_t dim, double shift) {
  require(timesteps.dim() == 1, "timesteps must have 1 dimension");
  require(dim >= 1 && (dim == 1 || shift < dim / 2),
          "dim must be positive and downscale_freq_shift less than half of it");
}

ScalarType result_type(const Tensor& timesteps) {
  return timesteps.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f(row) in parallel; each takes `half` sines and cosines of about 20 ns.
template <class F>
void for_rows(int64_t rows, int64_t half, F&& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / 32 / std::max<int64_t>(1, half));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

Tensor timestep_embedding(const Tensor& timesteps, int64_t dim, bool flip, double shift,
                          double scale, double period) {
  check(timesteps, dim, shift);
  const Frequencies frequencies(dim, shift, scale, period);
  const Scalars t(timesteps, "timesteps");
  const int64_t rows = timesteps.size(0), half = dim / 2;
  Tensor out = empty({rows, dim}, result_type(timesteps));
  dispatch(out, "timesteps", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      T* y = mutable_data<T>(out);
      for_rows(rows, half, [&, y](int64_t row) {
        T *sines = y + row * dim + (flip ? half : 0), *cosines = y + row * dim + (flip ? 0 : half);
        for (int64_t i = 0; i < half; ++i) {
          const double angle = t[row] * frequencies.of[i];
          sines[i] = T(std::sin(angle));
          cosines[i] = T(std::cos(angle));
        }
        if (dim % 2) y[row * dim + dim - 1] = 0;
      });
    }
  });
  return out;
}

Tensor timestep_embedding_backward(const Tensor& grad_in, const Tensor& timesteps, bool flip,
                                   double shift, double scale, double period) {
  const int64_t rows = grad_in.dim() == 2 ? grad_in.size(0) : -1;
  const int64_t dim = rows < 0 ? 0 : grad_in.size(1), half = dim / 2;
  check(timesteps, dim, shift);
  require(rows == timesteps.size(0) && grad_in.scalar_type() == result_type(timesteps),
          "grad_output must be of the embedding's shape and dtype");
  const Tensor grad = as_contiguous(grad_in);
  const Frequencies frequencies(dim, shift, scale, period);
  const Scalars t(timesteps, "timesteps");
  Tensor out = empty({rows}, timesteps.scalar_type());
  std::vector<double> sums(rows);
  dispatch(grad, "grad_output", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      const T* dy = data<T>(grad);
      for_rows(rows, half, [&, dy](int64_t row) {
        const T* of_sin = dy + row * dim + (flip ? half : 0);
        const T* of_cos = dy + row * dim + (flip ? 0 : half);
        for (int64_t i = 0; i < half; ++i) {
          const double f = frequencies.of[i], angle = t[row] * f;
          sums[row] += f * (of_sin[i] * std::cos(angle) - of_cos[i] * std::sin(angle));
        }
      });
    }
  });
  dispatch(out, "timesteps", [&]<class T>(T) {
    T* to = mutable_data<T>(out);
    for (int64_t row = 0; row < rows; ++row) store_n(to + row, broadcast(Acc<T>(sums[row])), 1);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("timestep_embedding", TORCH_BOX(&timestep_embedding));
  m.impl("timestep_embedding_backward", TORCH_BOX(&timestep_embedding_backward));
}

}  // namespace
}  // namespace aigc_fast

// Sines and cosines of timesteps at dim / 2 frequencies, and the gradient of the timesteps.
//
// In double throughout: the angle of a timestep of 1000 keeps four digits in fp32.
#include "per_sample.h"

#include <aigc_fast/lane_bits.h>

namespace aigc_fast {
namespace {

struct SinCos {
  Vec<double> sin, cos;
};

// Of angles up to 1.6e6 by their Taylor series around the nearest multiple of pi / 2, which is
// subtracted in three parts of 33 bits: their products with it are exact. Others by the library.
AIGC_INLINE SinCos sin_cos(Vec<double> angle) {
  typedef Vec<int64_t> I;
  if (lane_bits<double>(~(abs<double>(angle) <= 1.6e6)))
    return {each_lane<double>(angle, [](double v) { return std::sin(v); }),
            each_lane<double>(angle, [](double v) { return std::cos(v); })};
  const Vec<double> shifted = angle * (2 / M_PI) + 0x1.8p52;  // rounds to whole numbers
  const Vec<double> n = shifted - 0x1.8p52;
  const I quadrant = reinterpret_cast<I>(shifted);
  Vec<double> r = angle - n * 0x1.921fb54400000p+0;
  r = r - n * 0x1.0b4611a600000p-34;
  r = r - n * 0x1.3198a2e037073p-69;
  const Vec<double> z = r * r;
  Vec<double> sin = broadcast(1.0), cos = broadcast(1.0);
#pragma GCC unroll 8
  for (int k = 16; k > 0; k -= 2) {
    sin = 1.0 - z * (1.0 / (k * (k + 1))) * sin;
    cos = 1.0 - z * (1.0 / (k * (k - 1))) * cos;
  }
  sin *= r;
  const auto odd = (quadrant & 1) != 0;
  const I sign_of_sin = (quadrant & 2) << 62, sign_of_cos = ((quadrant + 1) & 2) << 62;
  const auto flip = [](Vec<double> v, I sign) {
    return reinterpret_cast<Vec<double>>(reinterpret_cast<I>(v) ^ sign);
  };
  return {flip(odd ? cos : sin, sign_of_sin), flip(odd ? sin : cos, sign_of_cos)};
}

// The first n lanes, as T.
template <class T, class N>
AIGC_INLINE void store_as(T* p, Vec<double> v, N n) {
  typedef T Narrow __attribute__((vector_size(kLanes<double> * sizeof(T))));
  const Narrow x = __builtin_convertvector(v, Narrow);
  std::memcpy(p, &x, n * sizeof(T));
}

// The first n elements, 0 behind them.
template <class T, class N>
AIGC_INLINE Vec<double> load_as(const T* p, N n) {
  T x[kLanes<double>] = {};
  std::memcpy(x, p, n * sizeof(T));
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = x[i];
  return v;
}

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

// A sine and a cosine take as long as so many elements.
constexpr int64_t kSinCosElements = 4;

Tensor timestep_embedding(const Tensor& timesteps, int64_t dim, bool flip, double shift,
                          double scale, double period) {
  check(timesteps, dim, shift);
  const Frequencies frequencies(dim, shift, scale, period);
  const Scalars t(timesteps, "timesteps");
  const int64_t rows = timesteps.size(0), half = dim / 2;
  Tensor out = empty({rows, dim}, acc_dtype(timesteps));
  dispatch(out, "timesteps", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      T* y = mutable_data<T>(out);
      in_parallel(rows, half * kSinCosElements, [&, y](int64_t row) {
        T *sines = y + row * dim + (flip ? half : 0), *cosines = y + row * dim + (flip ? 0 : half);
        const double step = t[row];
        for_vectors<double>(half, [&](int64_t i, auto n) {
          const SinCos found = sin_cos(step * load(frequencies.of.data() + i, n));
          store_as(sines + i, found.sin, n);
          store_as(cosines + i, found.cos, n);
        });
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
  require(rows == timesteps.size(0) && grad_in.scalar_type() == acc_dtype(timesteps),
          "grad_output must be of the embedding's shape and dtype");
  const Tensor grad = as_contiguous(grad_in);
  const Frequencies frequencies(dim, shift, scale, period);
  const Scalars t(timesteps, "timesteps");
  Tensor out = empty({rows}, timesteps.scalar_type());
  std::vector<double> sums(rows);
  dispatch(grad, "grad_output", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      const T* dy = data<T>(grad);
      in_parallel(rows, half * kSinCosElements, [&, dy](int64_t row) {
        const T* of_sin = dy + row * dim + (flip ? half : 0);
        const T* of_cos = dy + row * dim + (flip ? 0 : half);
        const double step = t[row];
        Vec<double> sum = {};
        for_vectors<double>(half, [&](int64_t i, auto n) {
          const Vec<double> f = load(frequencies.of.data() + i, n);
          const SinCos found = sin_cos(step * f);
          sum += f * (load_as(of_sin + i, n) * found.cos - load_as(of_cos + i, n) * found.sin);
        });
        sums[row] = sum_lanes<double>(sum);
      });
    }
  });
  for (int64_t row = 0; row < rows; ++row) set_number(out, row, sums[row]);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("timestep_embedding", TORCH_BOX(&timestep_embedding));
  m.impl("timestep_embedding_backward", TORCH_BOX(&timestep_embedding_backward));
}

}  // namespace
}  // namespace aigc_fast

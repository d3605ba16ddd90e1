// The mean over samples of weight * mean((model_output - target)^2), and its gradient.
//
// target = alpha * first - sigma * second; without a second it is first, without scales they are 1.
#include "per_sample.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// One value for each sample, 1 where there are none.
class Scale {
 public:
  Scale(const MaybeTensor& x, const char* name, int64_t batch) {
    if (!x) return;
    require(x->dim() == 1 && x->size(0) == batch, name, " must have shape (", batch, ",)");
    values_.emplace(*x, name);
  }
  double operator[](int64_t row) const { return values_ ? (*values_)[row] : 1; }

 private:
  std::optional<Scalars> values_;
};

// The errors of one call, whatever is made of them.
class Errors {
 public:
  Errors(const Tensor& output, const Tensor& first, const MaybeTensor& second,
         const MaybeTensor& alpha, const MaybeTensor& sigma, const MaybeTensor& weights)
      : rows(output, true),
        alpha_(alpha, "alpha", rows_of(output)),
        sigma_(sigma, "sigma", rows_of(output)),
        weights_(weights, "weights", rows_of(output)),
        output_(rows.arrange(output)),
        first_(arranged(first)),
        second_(second ? arranged(*second) : first_),
        paired_(second) {}

  // f(T{}, row, begin, length, weight, error) for pieces of samples, in parallel: T is the type of
  // model_output, and error(i, lanes) is model_output - target at begin + i.
  template <class F>
  void for_pieces(F&& f) {
    with_types([&]<class T, class S>(T, S) {
      using A = Acc<T>;
      const auto y = rows.read<T>(output_);
      const auto a = rows.read<S>(first_), b = rows.read<S>(second_);
      const auto run = [&](auto paired) {
        rows.for_pieces([=, this, &f](int64_t row, int64_t begin, int64_t length) {
          const T* ys = y.at + row * y.stride + begin;
          const S *as = a.at + row * a.stride + begin, *bs = b.at + row * b.stride + begin;
          const A alpha = A(alpha_[row]), sigma = A(sigma_[row]);
          f(T{}, row, begin, length, weights_[row], [=](int64_t i, auto lanes) {
            if constexpr (paired)
              return load(ys + i, lanes) -
                     (load(as + i, lanes) * alpha - load(bs + i, lanes) * sigma);
            else
              return load(ys + i, lanes) - load(as + i, lanes);
          });
        });
      };
      paired_ ? run(std::true_type{}) : run(std::false_type{});
    });
  }

  SampleRows rows;

 private:
  static int64_t rows_of(const Tensor& output) {
    require(output.dim() > 0 && output.numel() > 0, "model_output must be a batch and not empty");
    return output.size(0);
  }
  Tensor arranged(const Tensor& x) const {
    require(same_shape(x, output_), "sample and noise must have the shape of model_output");
    return rows.arrange(x);
  }
  // f(T{}, S{}) with the types of model_output and of the parts of the target.
  template <class F>
  void with_types(F&& f) {
    require(second_.scalar_type() == first_.scalar_type(), "sample and noise must have one dtype");
    dispatch(output_, "model_output", [&]<class T>(T) {
      if (first_.scalar_type() == output_.scalar_type()) return f(T{}, T{});
      if constexpr (sizeof(T) == 2)
        if (first_.scalar_type() == ScalarType::Float) return f(T{}, float{});
      require(false, "sample and noise must have the dtype of model_output or float32");
    });
  }

  Scale alpha_, sigma_, weights_;
  Tensor output_, first_, second_;
  bool paired_;
};

Tensor diffusion_loss(const Tensor& output, const Tensor& first, const MaybeTensor& second,
                      const MaybeTensor& alpha, const MaybeTensor& sigma,
                      const MaybeTensor& weights) {
  Errors errors(output, first, second, alpha, sigma, weights);
  SampleSums sums(errors.rows);
  errors.for_pieces(
      [&]<class T>(T, int64_t row, int64_t begin, int64_t length, double weight, auto error) {
        using A = Acc<T>;
        const auto [sum] = sums_over<A, 1>(length, [&](int64_t i, auto lanes, Vec<A>* total) {
          const Vec<A> e = error(i, lanes);
          total[0] += only<A>(e * e, lanes);
        });
        sums.set(row, begin, weight * sum);
      });
  return sums.of_all(output, 1 / static_cast<double>(output.numel()));
}

Tensor diffusion_loss_backward(const Tensor& grad_in, const Tensor& output, const Tensor& first,
                               const MaybeTensor& second, const MaybeTensor& alpha,
                               const MaybeTensor& sigma, const MaybeTensor& weights) {
  require(grad_in.numel() == 1, "grad_output must be a scalar");
  Errors errors(output, first, second, alpha, sigma, weights);
  const double grad = 2 * Scalars(grad_in, "grad_output")[0] / static_cast<double>(output.numel());
  Tensor out = errors.rows.order();
  errors.for_pieces(
      [&]<class T>(T, int64_t row, int64_t begin, int64_t length, double weight, auto error) {
        using A = Acc<T>;
        T* to = mutable_data<T>(out) + row * errors.rows.inner + begin;
        const A scale = A(grad * weight);
        for_vectors<A>(
            length, [&](int64_t i, auto lanes) { store(to + i, error(i, lanes) * scale, lanes); });
      });
  return errors.rows.finish(out);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("diffusion_loss", TORCH_BOX(&diffusion_loss));
  m.impl("diffusion_loss_backward", TORCH_BOX(&diffusion_loss_backward));
}

}  // namespace
}  // namespace aigc_fast

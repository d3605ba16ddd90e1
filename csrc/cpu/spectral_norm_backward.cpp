// The derivative of spectral normalisation.
#include "spectral_norm.h"
#include "stream.h"

namespace aigc_fast {
namespace {

// dW = dN / sigma + (dsigma - sum(dN * W) / sigma^2) u v', where N = W / sigma.
std::vector<Tensor> spectral_norm_backward(std::vector<Tensor> grads_in, const Tensor& grad_sigma,
                                           std::vector<Tensor> weights_in, const Tensor& vectors_in,
                                           const Tensor& sigma) {
  const WeightShapes s(weights_in);
  const ScalarType dtype = weights_in[0].scalar_type();
  const auto weights = contiguous(weights_in, s, s.all_elements(), dtype, "weights");
  const auto grads = contiguous(grads_in, s, s.all_elements(), dtype, "grad_output");
  require(
      vectors_in.dim() == 1 && vectors_in.size(0) == s.vectors && vectors_in.scalar_type() == dtype,
      "vectors must have shape (", s.vectors, ",) and the dtype of weights");
  const Tensor vectors = as_contiguous(vectors_in);
  for (const Tensor& t : {sigma, grad_sigma})
    require(t.dim() == 1 && t.size(0) == s.layers() && t.scalar_type() == dtype,
            "sigma must have shape (", s.layers(), ",) and the dtype of weights");
  std::vector<Tensor> results;
  dispatch(weights[0], "weights", [&]<class T>(T) {
    using A = Acc<T>;
    const Tensor dense = as_contiguous(sigma), dense_grad = as_contiguous(grad_sigma);
    const auto sigmas = values(data<T>(dense), s.layers());
    const auto add = values(data<T>(dense_grad), s.layers());
    for (const Tensor& w : weights) results.push_back(empty_like_dense(w));
    s.for_layers([&](int64_t l) {
      const int64_t size = s.elements(l), columns = s.columns[l];
      const T *w = data<T>(weights[l]), *g = data<T>(grads[l]);
      const std::vector<A> u = values(data<T>(vectors) + s.u_at[l], s.rows[l]);
      const std::vector<A> v = values(data<T>(vectors) + s.v_at[l], columns);
      std::vector<A> parts((size + kPiece - 1) / kPiece);
      in_pieces(size, kPiece, false, [&](int64_t first, int64_t last) {
        parts[first / kPiece] =
            sums_over<A, 1>(last - first, [&](int64_t i, auto lanes, Vec<A>* sum) {
              sum[0] += load(w + first + i, lanes) * load(g + first + i, lanes);
            })[0];
      });
      double product = 0;
      for (A part : parts) product += part;
      const A divisor = sigmas[l];
      const double factor = add[l] - product / (static_cast<double>(divisor) * divisor);
      const A inverse = A(1) / divisor;
      T* out = mutable_data<T>(results[l]);
      const bool streams = may_stream<T>(results[l], columns, s.size);
      in_pieces(s.rows[l], std::max<int64_t>(1, kPiece / columns), true,
                [&](int64_t first, int64_t last) {
                  for (int64_t r = first; r < last; ++r) {
                    const A of_row = static_cast<A>(factor * u[r]);
                    const int64_t at = r * columns;
                    for_columns<T, 1>(columns, {v.data()},
                                      [&](int64_t j, auto lanes, const auto& a, const auto& b) {
                                        Vectors<A, 2> x = load_two(g + at + j, lanes);
                                        x[0] = x[0] * inverse + a[0] * of_row;
                                        x[1] = x[1] * inverse + b[0] * of_row;
                                        if (streams) return stream_two(out + at + j, x, lanes);
                                        store_two(out + at + j, x, lanes);
                                      });
                  }
                  if (streams) end_of_stream();
                });
    });
  });
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward));
}

}  // namespace
}  // namespace aigc_fast

// What the vectors of each code add up to: the derivative of the distances of vector_quantize, and
// the counts and sums that moving averages of a codebook are made of.
//
// A code's vectors are added by one thread, in their order and in fp64: any number of threads gives
// the same bits, and no matrix of codes and vectors exists.
#include "sums.h"
#include "vectors.h"

namespace aigc_fast {
namespace {

template <class A>
AIGC_INLINE Vec<A> rounded(const Wide<A>& v) {
  double lanes[kLanes<A>];
  std::memcpy(lanes, v.half, sizeof lanes);
  A narrow[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) narrow[i] = static_cast<A>(lanes[i]);
  return load(narrow);
}

// out[code] = sum of term(n, code, its features from i on, i, lanes) over the vectors n of a code.
template <class T, class To, class F>
void sum_codes(const FeatureVectors& vectors, const Tensor& x, const Buckets& buckets, To* out,
               F&& term) {
  using A = Acc<T>;
  const int64_t dim = vectors.dim, codes = buckets.starts.size() - 1;
  const int64_t work = dim * (1 + vectors.count() / codes);  // of a code
  const Tensor rows = as_contiguous(torch::stable::transpose(x, 1, 2));
  const T* from = data<T>(rows);
  torch::stable::parallel_for(0, codes, grain_of(work), [&](int64_t begin, int64_t end) {
    for (int64_t code = begin; code < end; ++code)
      for_vectors<A>(dim, [&](int64_t i, auto lanes) {
        Wide<A> sum;
        for (int64_t at = buckets.starts[code]; at < buckets.starts[code + 1]; ++at) {
          const int64_t n = buckets.order[at];
          sum += term(n, code, from + n * dim + i, i, lanes);
        }
        store(out + code * dim + i, rounded(sum), lanes);
      });
  });
}

void check_indices(const Tensor& indices, const FeatureVectors& vectors) {
  require(indices.numel() == vectors.count() && indices.scalar_type() == ScalarType::Long,
          "indices must be int64 and as many as the vectors of x");
}

// With off = x - codebook[indices] and g = 2 * grad_distances:
//   dx = grad_quantized + beta * g * off
//   dcodebook[k] = -sum of g * off over the vectors of code k, or empty where it is not asked for
std::tuple<Tensor, Tensor> vector_quantize_backward(const Tensor& grad_in,
                                                    const MaybeTensor& passed_in,
                                                    const Tensor& x_in, const Tensor& codebook_in,
                                                    const Tensor& indices_in, double beta,
                                                    bool codebook_grad) {
  check_codebook(x_in, codebook_in);
  const Tensor x = as_contiguous(x_in), codebook = as_contiguous(codebook_in);
  const Tensor grad = as_contiguous(grad_in), indices = as_contiguous(indices_in);
  const FeatureVectors rows(x);
  require(grad.numel() == rows.count(), "grad_distances must have a number for each vector of x");
  require(grad.scalar_type() == acc_dtype(x), "grad_distances must be float32, or float64 with x");
  check_indices(indices, rows);
  if (passed_in) check_like(*passed_in, x, "grad_quantized");
  const Tensor passed = passed_in ? as_contiguous(*passed_in) : x;
  const int64_t codes = codebook.size(0), dim = rows.dim;
  const Buckets buckets(data<int64_t>(indices), rows.count(), codes);
  Tensor dx = empty_like_dense(x);
  Tensor dcodebook = empty({codebook_grad ? codes : 0, dim}, x.scalar_type());
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const int64_t* code_of = data<int64_t>(indices);
    const T* book = data<T>(codebook);
    const A* g = data<A>(grad);
    const int64_t blocks = (rows.count() + kVectorBlock - 1) / kVectorBlock;
    const int64_t grain = grain_of(kVectorBlock * dim);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<A> block(kVectorBlock * dim), added(passed_in ? kVectorBlock * dim : 0);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kVectorBlock,
                      count = std::min(kVectorBlock, rows.count() - first);
        rows.gather(data<T>(x), first, count, block.data());
        if (passed_in) rows.gather(data<T>(passed), first, count, added.data());
        for (int64_t row = 0; row < count; ++row) {
          const A factor = 2 * A(beta) * g[first + row];
          A* to = block.data() + row * dim;
          const A* more = passed_in ? added.data() + row * dim : nullptr;
          const T* e = book + code_of[first + row] * dim;
          for_vectors<A>(dim, [&](int64_t i, auto n) {
            const Vec<A> v = (load(to + i, n) - load(e + i, n)) * factor;
            store(to + i, passed_in ? v + load(more + i, n) : v, n);
          });
        }
        rows.scatter(block.data(), first, count, mutable_data<T>(dx));
      }
    });
    if (!codebook_grad) return;
    sum_codes<T>(rows, x, buckets, mutable_data<T>(dcodebook),
                 [&](int64_t n, int64_t code, const T* from, int64_t i, auto lanes) {
                   const Vec<A> off = load(from, lanes) - load(book + code * dim + i, lanes);
                   return widen<A>(off) * widen<A>(broadcast<A>(-2 * g[n]));
                 });
  });
  return {dx, dcodebook};
}

// (vectors of each code, their sums)
std::tuple<Tensor, Tensor> codebook_moments(const Tensor& x_in, const Tensor& indices_in,
                                            int64_t codes) {
  require(x_in.dim() == 3 && x_in.size(1) > 0, "x must have 3 dimensions and features");
  require(codes > 0, "num_codes must be at least 1, got ", codes);
  const Tensor x = as_contiguous(x_in), indices = as_contiguous(indices_in);
  const FeatureVectors vectors(x);
  check_indices(indices, vectors);
  const Buckets buckets(data<int64_t>(indices), vectors.count(), codes);
  Tensor counts = empty({codes}, ScalarType::Long);
  Tensor sums = empty({codes, vectors.dim}, acc_dtype(x));
  for (int64_t code = 0; code < codes; ++code)
    mutable_data<int64_t>(counts)[code] = buckets.starts[code + 1] - buckets.starts[code];
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    sum_codes<T>(vectors, x, buckets, mutable_data<A>(sums),
                 [&](int64_t, int64_t, const T* from, int64_t, auto lanes) {
                   return widen<A>(load(from, lanes));
                 });
  });
  return {counts, sums};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("vector_quantize_backward", TORCH_BOX(&vector_quantize_backward));
  m.impl("codebook_moments", TORCH_BOX(&codebook_moments));
}

}  // namespace
}  // namespace aigc_fast

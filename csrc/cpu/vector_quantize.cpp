// The nearest code of every vector: quantized = codebook[k], k = argmin |x - codebook[k]|^2, and
// the derivative of that squared distance.
//
// The argmin of |e|^2 - 2 x.e is the argmax of x.e - |e|^2 / 2, which a chain of multiply-adds
// gives that starts at -|e|^2 / 2, feature by feature. Codes lie along the lanes: they are packed
// once a call into panels of two vectors, feature after feature, and a tile of kRows vectors x
// meets a panel in registers. No score is ever stored: every lane keeps the best of its codes. A
// panel stays in the first cache for all the rows of a block, and a block's rows in the second.
#include <cstring>
#include <vector>

#include "sums.h"
#include "tensor.h"

namespace aigc_fast {
namespace {

// 16 chains of multiply-adds with 32 registers, 8 with 16: two a cycle, each waiting four.
constexpr int kRows = kVectorBytes == 64 ? 8 : 4, kVectors = 2;
constexpr int64_t kBlock = 64;
template <class A>
constexpr int64_t kCodes = kVectors * kLanes<A>;

// Vectors of `dim` features in a contiguous tensor (outer, dim, inner).
struct Vectors {
  int64_t outer, dim, inner;

  explicit Vectors(const Tensor& x) : outer(x.size(0)), dim(x.size(1)), inner(x.size(2)) {}
  int64_t count() const { return outer * inner; }

  // f(first element, row, rows) of every run of vectors [begin, begin + count) with one outer
  // index: their features lie `inner` apart, they themselves one apart.
  template <class F>
  void for_runs(int64_t begin, int64_t count, F&& f) const {
    for (int64_t row = 0; row < count;) {
      const int64_t o = (begin + row) / inner, i = (begin + row) % inner;
      const int64_t rows = std::min(count - row, inner - i);
      f(o * dim * inner + i, row, rows);
      row += rows;
    }
  }

  // The vectors [begin, begin + count) as rows of `to` in the dtype of the arithmetic, and back.
  template <class T>
  void gather(const T* from, int64_t begin, int64_t count, Acc<T>* to) const {
    using A = Acc<T>;
    if (inner == 1) {
      from += begin * dim;
      return for_vectors<A>(count * dim,
                            [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
    }
    for_runs(begin, count, [&](int64_t at, int64_t row, int64_t rows) {
      for (int64_t d = 0; d < dim; ++d)
        for_vectors<A>(rows, [&](int64_t i, auto n) {
          const Vec<A> v = load(from + at + d * inner + i, n);
          for (int k = 0; k < n; ++k) to[(row + i + k) * dim + d] = v[k];
        });
    });
  }
  template <class T>
  void scatter(const Acc<T>* from, int64_t begin, int64_t count, T* to) const {
    using A = Acc<T>;
    if (inner == 1) {
      to += begin * dim;
      return for_vectors<A>(count * dim,
                            [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
    }
    for_runs(begin, count, [&](int64_t at, int64_t row, int64_t rows) {
      for (int64_t d = 0; d < dim; ++d)
        for_vectors<A>(rows, [&](int64_t i, auto n) {
          Vec<A> v = {};
          for (int k = 0; k < n; ++k) v[k] = from[(row + i + k) * dim + d];
          store(to + at + d * inner + i, v, n);
        });
    });
  }
};

void check(const Tensor& x, const Tensor& codebook) {
  require(x.dim() == 3, "x must have 3 dimensions");
  require(codebook.dim() == 2 && codebook.size(0) > 0 && codebook.size(1) == x.size(1),
          "codebook must have shape (codes, ", x.size(1), ")");
  require(codebook.size(0) < (int64_t{1} << 31), "codebook must have less than 2^31 codes");
  require(codebook.scalar_type() == x.scalar_type(), "codebook must have the dtype of x");
}

// The codes in panels: feature after feature of kCodes codes, and where the chains of these start.
template <class A>
struct Panels {
  int64_t dim, count;
  std::vector<A> values, starts;

  template <class T>
  Panels(const T* codebook, int64_t codes, int64_t dim)
      : dim(dim),
        count((codes + kCodes<A> - 1) / kCodes<A>),
        values(count * dim * kCodes<A>),
        starts(count * kCodes<A>, -std::numeric_limits<A>::infinity()) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (dim * kCodes<A>));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t code = begin * kCodes<A>; code < std::min(codes, end * kCodes<A>); ++code) {
        const int64_t panel = code / kCodes<A>, lane = code % kCodes<A>;
        A *to = values.data() + panel * dim * kCodes<A> + lane, norm = 0;
        for_vectors<A>(dim, [&](int64_t d, auto n) {
          const Vec<A> v = load(codebook + code * dim + d, n);
          for (int k = 0; k < n; ++k) {
            to[(d + k) * kCodes<A>] = v[k];
            norm += v[k] * v[k];
          }
        });
        starts[code] = norm * A(-0.5);
      }
    });
  }
};

// Of each lane the best score and the number of the first code of the vector that has it.
template <class A>
struct Best {
  Vec<A> score = broadcast(-std::numeric_limits<A>::infinity());
  Vec<Bits<A>> code = {};

  // A score that is NaN or minus infinity is never the better one.
  AIGC_INLINE void offer(Vec<A> other, Bits<A> first) {
    const auto better = other > score;
    score = better ? other : score;
    code = better ? Vec<Bits<A>>{} + first : code;
  }
  // The best of all lanes, and of equal ones that of the lowest number.
  int64_t of_all() const {
    int best = 0;
    auto number = [&](int lane) { return int64_t{code[lane]} + lane; };
    for (int lane = 1; lane < kLanes<A>; ++lane)
      if (score[lane] > score[best] || (score[lane] == score[best] && number(lane) < number(best)))
        best = lane;
    return score[best] == -std::numeric_limits<A>::infinity() ? 0 : number(best);
  }
};

// kRows vectors x against one panel.
template <class A>
void meet(const A* x, const Panels<A>& panels, int64_t panel, Best<A>* best) {
  const int64_t dim = panels.dim;
  const A* codes = panels.values.data() + panel * dim * kCodes<A>;
  Vec<A> scores[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      scores[r][v] = load(panels.starts.data() + panel * kCodes<A> + v * kLanes<A>);
  for (int64_t d = 0; d < dim; ++d, codes += kCodes<A>) {
    const Vec<A> first = load(codes), second = load(codes + kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> value = broadcast(x[r * dim + d]);
      scores[r][0] += value * first;
      scores[r][1] += value * second;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      best[r].offer(scores[r][v], static_cast<Bits<A>>(panel * kCodes<A> + v * kLanes<A>));
}

// (quantized, |x - quantized|^2, numbers of codes)
std::tuple<Tensor, Tensor, Tensor> vector_quantize(const Tensor& x_in, const Tensor& codebook_in) {
  check(x_in, codebook_in);
  const Tensor x = as_contiguous(x_in), codebook = as_contiguous(codebook_in);
  const Vectors rows(x);
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor quantized = empty_like_dense(x);
  Tensor distances = empty({rows.outer, rows.inner}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor indices = empty({rows.outer, rows.inner}, ScalarType::Long);
  if (rows.count() == 0) return {quantized, distances, indices};
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T *from = data<T>(x), *codes = data<T>(codebook);
    const Panels<A> panels(codes, codebook.size(0), rows.dim);
    const int64_t blocks = (rows.count() + kBlock - 1) / kBlock, dim = rows.dim;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> block(kBlock * dim), nearest(kBlock * dim);
      std::vector<Best<A>> best(kBlock);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kBlock, count = std::min(kBlock, rows.count() - first);
        rows.gather(from, first, count, block.data());
        std::fill(best.begin(), best.end(), Best<A>{});
        for (int64_t panel = 0; panel < panels.count; ++panel)
          for (int64_t row = 0; row < count; row += kRows)  // the rows of the last tile are there
            meet(block.data() + row * dim, panels, panel, best.data() + row);
        for (int64_t row = 0; row < count; ++row) {
          const int64_t code = best[row].of_all();
          A *in = block.data() + row * dim, *out = nearest.data() + row * dim;
          const auto [sum] = sums_over<A, 1>(dim, [&](int64_t i, auto n, Vec<A>* sums) {
            const Vec<A> e = load(codes + code * dim + i, n), off = load(in + i, n) - e;
            store(out + i, e, n);
            sums[0] += off * off;
          });
          mutable_data<int64_t>(indices)[first + row] = code;
          mutable_data<A>(distances)[first + row] = sum;
        }
        rows.scatter(nearest.data(), first, count, mutable_data<T>(quantized));
      }
    });
  });
  return {quantized, distances, indices};
}

// The vectors of every code in the order of their numbers: those of code k are
// order[starts[k]], ..., order[starts[k + 1] - 1].
struct Buckets {
  std::vector<int64_t> starts, order;

  Buckets(const int64_t* indices, int64_t count, int64_t codes) : starts(codes + 1), order(count) {
    for (int64_t n = 0; n < count; ++n) {
      require(indices[n] >= 0 && indices[n] < codes, "indices must be from 0 to ", codes - 1,
              ", got ", indices[n]);
      ++starts[indices[n] + 1];
    }
    for (int64_t k = 0; k < codes; ++k) starts[k + 1] += starts[k];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t n = 0; n < count; ++n) order[next[indices[n]]++] = n;
  }

  // f(code) for all codes, threaded.
  template <class F>
  void for_codes(int64_t dim, F&& f) const {
    const int64_t codes = starts.size() - 1;
    const int64_t work = dim * (1 + static_cast<int64_t>(order.size()) / codes);
    torch::stable::parallel_for(0, codes, std::max<int64_t>(1, kGrain / work),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t code = begin; code < end; ++code) f(code);
                                });
  }
};

// With off = x - codebook[indices] and g = 2 * grad_distances:
//   dx = grad_quantized + beta * g * off
//   dcodebook[k] = -sum of g * off over the vectors of code k, or empty where it is not asked for
std::tuple<Tensor, Tensor> vector_quantize_backward(const Tensor& grad_in,
                                                    const std::optional<Tensor>& passed_in,
                                                    const Tensor& x_in, const Tensor& codebook_in,
                                                    const Tensor& indices_in, double beta,
                                                    bool codebook_grad) {
  check(x_in, codebook_in);
  const Tensor x = as_contiguous(x_in), codebook = as_contiguous(codebook_in);
  const Tensor grad = as_contiguous(grad_in), indices = as_contiguous(indices_in);
  const Vectors rows(x);
  const bool wide = x.scalar_type() == ScalarType::Double;
  require(grad.numel() == rows.count(), "grad_distances must have a number for each vector of x");
  require(grad.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
          "grad_distances must be float32, or float64 with x");
  require(indices.numel() == rows.count() && indices.scalar_type() == ScalarType::Long,
          "indices must be int64 and as many as the vectors of x");
  if (passed_in)
    require(same_shape(*passed_in, x) && passed_in->scalar_type() == x.scalar_type(),
            "grad_quantized must have the shape and dtype of x");
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
    const int64_t blocks = (rows.count() + kBlock - 1) / kBlock;
    const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * dim));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<A> block(kBlock * dim), added(passed_in ? kBlock * dim : 0);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kBlock, count = std::min(kBlock, rows.count() - first);
        rows.gather(data<T>(x), first, count, block.data());
        if (passed_in) rows.gather(data<T>(passed), first, count, added.data());
        for (int64_t row = 0; row < count; ++row) {
          const A factor = 2 * A(beta) * g[first + row];
          A *to = block.data() + row * dim, *more = added.data() + row * dim;
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
    const Tensor by_vector = as_contiguous(torch::stable::transpose(x, 1, 2));
    const T* from = data<T>(by_vector);
    buckets.for_codes(dim, [&](int64_t code) {
      const T* e = book + code * dim;
      std::vector<double> sum(dim);
      for (int64_t at = buckets.starts[code]; at < buckets.starts[code + 1]; ++at) {
        const int64_t n = buckets.order[at];
        const Wide<A> factor = widen<A>(broadcast<A>(-2 * g[n]));
        for_vectors<A>(dim, [&](int64_t i, auto lanes) {
          const Vec<A> off = load(from + n * dim + i, lanes) - load(e + i, lanes);
          add_to<A>(sum.data() + i, widen<A>(off) * factor, lanes);
        });
      }
      const std::vector<A> rounded(sum.begin(), sum.end());
      T* to = mutable_data<T>(dcodebook) + code * dim;
      for_vectors<A>(dim,
                     [&](int64_t i, auto n) { store(to + i, load(rounded.data() + i, n), n); });
    });
  });
  return {dx, dcodebook};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&vector_quantize_backward));
}

}  // namespace
}  // namespace aigc_fast

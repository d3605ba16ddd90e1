// Vectors along any dimension of a tensor, and those of one code after the other.
#pragma once

#include <vector>

#include "tensor.h"

namespace aigc_fast {

// Vectors that are gathered at a time.
constexpr int64_t kVectorBlock = 64;

// Vectors of `dim` features in a contiguous tensor (outer, dim, inner).
struct FeatureVectors {
  int64_t outer, dim, inner;

  explicit FeatureVectors(const Tensor& x) : outer(x.size(0)), dim(x.size(1)), inner(x.size(2)) {}
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
    if (inner == 1) return convert(from + begin * dim, count * dim, to);
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
    if (inner == 1) return convert(from, count * dim, to + begin * dim);
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

inline void check_codebook(const Tensor& x, const Tensor& codebook) {
  require(x.dim() == 3, "x must have 3 dimensions");
  require(
      codebook.dim() == 2 && codebook.size(0) > 0 && x.size(1) > 0 && codebook.size(1) == x.size(1),
      "codebook must have shape (codes, ", x.size(1), ")");
  require(codebook.size(0) < (int64_t{1} << 31), "codebook must have less than 2^31 codes");
  require(codebook.scalar_type() == x.scalar_type(), "codebook must have the dtype of x");
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
};

}  // namespace aigc_fast

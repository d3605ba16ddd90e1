// Spectral normalisation of many weights in one call: W / sigma with sigma = u . W v, after power
// iterations v <- normalised W' u, u <- normalised W v; and its derivative.
//
// A weight is a matrix of its first dimension by all others. A thread takes one matrix after
// another, so that the products and the division read it from the cache; only those that outgrow
// it are cut into pieces for all threads. The last product of the iterations, W v, gives sigma too.
#include <algorithm>
#include <atomic>

#include "sums.h"
#include "tensor.h"

namespace aigc_fast {
namespace {

// Elements of a matrix that all threads share, of a piece of it, and the columns of a piece in
// W' u, where every piece walks down all rows.
constexpr int64_t kShared = 1 << 20, kPiece = 16384, kColumns = 1024;

// The matrices of a call.
struct Shapes {
  std::vector<int64_t> rows, columns;
  int64_t size = 0;  // elements of all
  // Where the vectors of each matrix lie in one tensor of all: every u, then every v.
  std::vector<int64_t> u_at, v_at;
  int64_t vectors = 0;

  explicit Shapes(const std::vector<Tensor>& weights) {
    require(!weights.empty(), "weights must not be empty");
    for (const Tensor& w : weights) {
      require(w.scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
      require(w.dim() >= 2 && w.numel() > 0, "weights must have 2 dimensions, and elements");
      rows.push_back(w.size(0));
      columns.push_back(w.numel() / w.size(0));
      size += w.numel();
    }
    for (int64_t n : rows) u_at.push_back(vectors), vectors += n;
    for (int64_t n : columns) v_at.push_back(vectors), vectors += n;
  }
  int64_t layers() const { return rows.size(); }
  int64_t elements(int64_t layer) const { return rows[layer] * columns[layer]; }
  bool shared(int64_t layer) const { return elements(layer) > kShared; }
  std::vector<int64_t> all_elements() const {
    std::vector<int64_t> result;
    for (int64_t l = 0; l < layers(); ++l) result.push_back(elements(l));
    return result;
  }

  // f(layer) for every layer: those that outgrow the cache one after the other, in which f may
  // use all threads, then the others, the largest first.
  template <class F>
  void for_layers(F f) const {
    std::vector<int64_t> order;
    for (int64_t l = 0; l < layers(); ++l) shared(l) ? f(l) : order.push_back(l);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return elements(a) > elements(b); });
    const int64_t count = order.size(), grain = std::max<int64_t>(1, count * kGrain / size);
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, count, grain, [&](int64_t, int64_t) {
      for (int64_t i; (i = next++) < count;) f(order[i]);
    });
  }
};

// f(first, last) for pieces of [0, size), in parallel unless within a parallel region. `back`: a
// thread begins with its last piece, for a pass after one that went forth: it then meets first what
// its cache still has.
template <class F>
void in_pieces(int64_t size, int64_t piece, bool back, F f) {
  const int64_t count = (size + piece - 1) / piece;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = back ? begin + end - 1 - i : i;
      f(p * piece, std::min(size, (p + 1) * piece));
    }
  });
}

std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors, const Shapes& s,
                               const std::vector<int64_t>& sizes, ScalarType dtype,
                               const char* name) {
  require(static_cast<int64_t>(tensors.size()) == s.layers(), name, " must have ", s.layers(),
          " tensors");
  std::vector<Tensor> result;
  for (size_t l = 0; l < tensors.size(); ++l) {
    require(tensors[l].numel() == sizes[l] && tensors[l].scalar_type() == dtype, name,
            " must have the sizes and dtype of weights");
    result.push_back(as_contiguous(tensors[l]));
  }
  return result;
}

template <class T>
std::vector<Acc<T>> values(const T* from, int64_t size) {
  std::vector<Acc<T>> result(size);
  convert(from, size, result.data());
  return result;
}

template <class T, class A>
AIGC_INLINE A dot(const T* a, const A* b, int64_t size) {
  return sums_over<A, 1>(size, [&](int64_t i, auto lanes, Vec<A>* sum) {
    sum[0] += load(a + i, lanes) * load(b + i, lanes);
  })[0];
}

// sum += factors' W for `width` columns and N rows of W.
template <int N, class T, class A>
void add_rows(const T* w, const A* factors, A* sum, int64_t stride, int64_t width) {
  for_vectors<A>(width, [&](int64_t j, auto lanes) {
    Vec<A> part = {};
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) part += load(w + k * stride + j, lanes) * factors[k];
    store(sum + j, load(sum + j, lanes) + part, lanes);
  });
}
// Of all rows; eight at a time, which rounds less than one after the other.
template <class T, class A>
void add_all_rows(const T* w, const A* factors, A* sum, int64_t rows, int64_t stride,
                  int64_t width) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) add_rows<8>(w + r * stride, factors + r, sum, stride, width);
  for (; r < rows; ++r) add_rows<1>(w + r * stride, factors + r, sum, stride, width);
}

// x / max(|x|, eps); returns |x|.
template <class A>
double normalize(std::vector<A>& x, double eps) {
  Wide<A> squares;
  for_vectors<A>(x.size(), [&](int64_t i, auto lanes) {
    const Wide<A> value = widen<A>(load(x.data() + i, lanes));
    squares += value * value;
  });
  const double length = std::sqrt(squares.sum());
  const A factor = static_cast<A>(1 / std::max(length, eps));
  for_vectors<A>(x.size(), [&](int64_t i, auto lanes) {
    store(x.data() + i, load(x.data() + i, lanes) * factor, lanes);
  });
  return length;
}

// (W / sigma of each weight, sigma, the vectors)
std::tuple<std::vector<Tensor>, Tensor, Tensor> spectral_norm(std::vector<Tensor> weights_in,
                                                              std::vector<Tensor> u_in,
                                                              std::vector<Tensor> v_in,
                                                              int64_t iterations, double eps) {
  require(iterations >= 0, "iterations must not be negative");
  const Shapes s(weights_in);
  const ScalarType dtype = weights_in[0].scalar_type();
  const auto weights = contiguous(weights_in, s, s.all_elements(), dtype, "weights");
  const auto u_given = contiguous(u_in, s, s.rows, dtype, "u");
  const auto v_given = contiguous(v_in, s, s.columns, dtype, "v");
  std::vector<Tensor> normal;
  Tensor sigma = empty({s.layers()}, dtype), vectors = empty({s.vectors}, dtype);
  dispatch(weights[0], "weights", [&]<class T>(T) {
    using A = Acc<T>;
    for (const Tensor& w : weights) normal.push_back(empty_like_dense(w));
    T *sigma_at = mutable_data<T>(sigma), *vectors_at = mutable_data<T>(vectors);
    s.for_layers([&](int64_t l) {
      const int64_t rows = s.rows[l], columns = s.columns[l];
      const int64_t rows_of_piece = std::max<int64_t>(1, kPiece / columns);
      const int64_t width = s.shared(l) ? kColumns : columns;
      const T* w = data<T>(weights[l]);
      std::vector<A> u = values(data<T>(u_given[l]), rows);
      std::vector<A> v = values(data<T>(v_given[l]), columns);
      double found = 0;
      const auto times_v = [&] {
        std::vector<A> product(rows);
        in_pieces(rows, rows_of_piece, true, [&](int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r)
            product[r] = dot(w + r * columns, v.data(), columns);
        });
        return product;
      };
      for (int64_t i = 0; i < iterations; ++i) {
        std::fill(v.begin(), v.end(), A(0));
        in_pieces(columns, width, false, [&](int64_t first, int64_t last) {
          add_all_rows(w + first, u.data(), v.data() + first, rows, columns, last - first);
        });
        normalize(v, eps);
        u = times_v();
        const double length = normalize(u, eps);
        found = length * (length / std::max(length, eps));  // u . W v
      }
      if (iterations == 0) {
        const std::vector<A> product = times_v();
        for (int64_t r = 0; r < rows; ++r) found += static_cast<double>(u[r]) * product[r];
      }
      T* out = mutable_data<T>(normal[l]);
      // A division takes 16 cycles a vector, more than the way to memory.
      const A factor = static_cast<A>(1 / found);
      in_pieces(rows * columns, kPiece, false, [&](int64_t first, int64_t last) {
        for_vectors<A>(last - first, [&](int64_t i, auto lanes) {
          store(out + first + i, load(w + first + i, lanes) * factor, lanes);
        });
      });
      convert(u.data(), rows, vectors_at + s.u_at[l]);
      convert(v.data(), columns, vectors_at + s.v_at[l]);
      store_one(sigma_at + l, static_cast<A>(found));
    });
  });
  return {normal, sigma, vectors};
}

// dW = dN / sigma + (dsigma - sum(dN * W) / sigma^2) u v', where N = W / sigma.
std::vector<Tensor> spectral_norm_backward(std::vector<Tensor> grads_in, const Tensor& grad_sigma,
                                           std::vector<Tensor> weights_in, const Tensor& vectors_in,
                                           const Tensor& sigma) {
  const Shapes s(weights_in);
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
      in_pieces(s.rows[l], std::max<int64_t>(1, kPiece / columns), true,
                [&](int64_t first, int64_t last) {
                  for (int64_t r = first; r < last; ++r) {
                    const A of_row = static_cast<A>(factor * u[r]);
                    const int64_t at = r * columns;
                    for_vectors<A>(columns, [&](int64_t j, auto lanes) {
                      const Vec<A> outer = load(v.data() + j, lanes) * of_row;
                      store(out + at + j, load(g + at + j, lanes) * inverse + outer, lanes);
                    });
                  }
                });
    });
  });
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward));
}

}  // namespace
}  // namespace aigc_fast

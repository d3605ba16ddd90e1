// Spectral normalisation of many weights in one call: W / sigma with sigma = u . W v, after power
// iterations v <- normalised W' u, u <- normalised W v; and its derivative.
//
// A weight is a matrix of its first dimension by all others. The units of work are pieces of any
// of the matrices, so that threads share large ones and take several small ones. The last product
// of the iterations, W v, gives sigma as well: W is read twice, and once more to be divided.
#include <algorithm>

#include "sums.h"
#include "tensor.h"

namespace aigc_fast {
namespace {

// Elements of a unit, and columns of one in W' u, where every unit walks down all rows.
constexpr int64_t kUnit = 16384, kColumns = 1024;

// A piece of matrix `layer`: rows, or columns, [first, last).
struct Unit {
  int64_t layer, first, last;
};

// The matrices of a call.
struct Shapes {
  std::vector<int64_t> rows, columns;
  std::vector<Unit> by_rows, by_columns;

  explicit Shapes(const std::vector<Tensor>& weights) {
    require(!weights.empty(), "weights must not be empty");
    for (int64_t l = 0; l < static_cast<int64_t>(weights.size()); ++l) {
      const Tensor& w = weights[l];
      require(w.scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
      require(w.dim() >= 2 && w.numel() > 0, "weights must have 2 dimensions, and elements");
      rows.push_back(w.size(0));
      columns.push_back(w.numel() / w.size(0));
      cut(l, rows[l], std::max<int64_t>(1, kUnit / columns[l]), &by_rows);
      cut(l, columns[l], kColumns, &by_columns);
    }
  }
  static void cut(int64_t layer, int64_t size, int64_t step, std::vector<Unit>* units) {
    for (int64_t i = 0; i < size; i += step) units->push_back({layer, i, std::min(size, i + step)});
  }
  int64_t layers() const { return rows.size(); }
};

template <class F>
void for_units(const std::vector<Unit>& units, F f) {
  torch::stable::parallel_for(0, units.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(units[i]);
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

std::vector<int64_t> elements(const Shapes& s) {
  std::vector<int64_t> result;
  for (int64_t l = 0; l < s.layers(); ++l) result.push_back(s.rows[l] * s.columns[l]);
  return result;
}

template <class T>
std::vector<Acc<T>> values(const Tensor& x) {
  using A = Acc<T>;
  std::vector<A> result(x.numel());
  for_vectors<A>(result.size(), [&](int64_t i, auto lanes) {
    store(result.data() + i, load(data<T>(x) + i, lanes), lanes);
  });
  return result;
}

template <class T>
Tensor like(const std::vector<Acc<T>>& values, const Tensor& x) {
  Tensor result = empty_like_dense(x);
  for_vectors<Acc<T>>(values.size(), [&](int64_t i, auto lanes) {
    store(mutable_data<T>(result) + i, load(values.data() + i, lanes), lanes);
  });
  return result;
}

template <class T, class A>
AIGC_INLINE A dot(const T* a, const A* b, int64_t size) {
  return sums_over<A, 1>(size, [&](int64_t i, auto lanes, Vec<A>* sum) {
    sum[0] += load(a + i, lanes) * load(b + i, lanes);
  })[0];
}

// x / max(|x|, eps); returns |x|.
template <class A>
double normalize(std::vector<A>& x, double eps) {
  double squares = 0;
  for (A value : x) squares += static_cast<double>(value) * value;
  const double length = std::sqrt(squares);
  for (A& value : x) value = static_cast<A>(value / std::max(length, eps));
  return length;
}

// (W / sigma, sigma, u, v), lists but for sigma.
std::tuple<std::vector<Tensor>, Tensor, std::vector<Tensor>, std::vector<Tensor>> spectral_norm(
    std::vector<Tensor> weights_in, std::vector<Tensor> u_in, std::vector<Tensor> v_in,
    int64_t iterations, double eps) {
  require(iterations >= 0, "iterations must not be negative");
  const Shapes s(weights_in);
  const ScalarType dtype = weights_in[0].scalar_type();
  const auto weights = contiguous(weights_in, s, elements(s), dtype, "weights");
  const auto u_given = contiguous(u_in, s, s.rows, dtype, "u");
  const auto v_given = contiguous(v_in, s, s.columns, dtype, "v");
  std::vector<Tensor> normal, u_out, v_out;
  Tensor sigma = empty({s.layers()}, dtype);
  dispatch(weights[0], "weights", [&]<class T>(T) {
    using A = Acc<T>;
    std::vector<std::vector<A>> u, v, product;
    std::vector<T*> to;
    std::vector<double> sigmas(s.layers());
    for (int64_t l = 0; l < s.layers(); ++l) {
      u.push_back(values<T>(u_given[l]));
      v.push_back(values<T>(v_given[l]));
      product.emplace_back(s.rows[l]);
      normal.push_back(empty_like_dense(weights[l]));
      to.push_back(mutable_data<T>(normal[l]));
    }
    const auto times_v = [&] {  // product = W v
      for_units(s.by_rows, [&](const Unit& unit) {
        const int64_t width = s.columns[unit.layer];
        const T* w = data<T>(weights[unit.layer]);
        for (int64_t r = unit.first; r < unit.last; ++r)
          product[unit.layer][r] = dot(w + r * width, v[unit.layer].data(), width);
      });
    };
    for (int64_t i = 0; i < iterations; ++i) {
      for_units(s.by_columns, [&](const Unit& unit) {  // v = W' u
        const int64_t height = s.rows[unit.layer], width = s.columns[unit.layer];
        const T* w = data<T>(weights[unit.layer]);
        const A* factor = u[unit.layer].data();
        A* sum = v[unit.layer].data();
        std::fill(sum + unit.first, sum + unit.last, A(0));
        for (int64_t r = 0; r < height; r += 4)
          for_vectors<A>(unit.last - unit.first, [&](int64_t j, auto lanes) {
            const int64_t c = unit.first + j;
            Vec<A> part = {};
            for (int64_t k = r; k < std::min(r + 4, height); ++k)
              part += load(w + k * width + c, lanes) * factor[k];
            store(sum + c, load(sum + c, lanes) + part, lanes);
          });
      });
      for (auto& vector : v) normalize(vector, eps);
      times_v();
      for (int64_t l = 0; l < s.layers(); ++l) {
        u[l] = product[l];
        const double length = normalize(u[l], eps);
        sigmas[l] = length * (length / std::max(length, eps));  // u . W v
      }
    }
    if (iterations == 0) {
      times_v();
      for (int64_t l = 0; l < s.layers(); ++l) {
        for (int64_t r = 0; r < s.rows[l]; ++r)
          sigmas[l] += static_cast<double>(u[l][r]) * product[l][r];
      }
    }
    for_units(s.by_rows, [&](const Unit& unit) {
      const int64_t width = s.columns[unit.layer], start = unit.first * width;
      const T* w = data<T>(weights[unit.layer]) + start;
      T* out = to[unit.layer] + start;
      const A divisor = static_cast<A>(sigmas[unit.layer]);
      for_vectors<A>(unit.last * width - start, [&](int64_t i, auto lanes) {
        store(out + i, load(w + i, lanes) / divisor, lanes);
      });
    });
    for (int64_t l = 0; l < s.layers(); ++l) {
      u_out.push_back(like<T>(u[l], u_given[l]));
      v_out.push_back(like<T>(v[l], v_given[l]));
      store_n(mutable_data<T>(sigma) + l, broadcast(static_cast<A>(sigmas[l])), 1);
    }
  });
  return {normal, sigma, u_out, v_out};
}

// dW = dN / sigma + (dsigma - sum(dN * W) / sigma^2) u v', where N = W / sigma.
std::vector<Tensor> spectral_norm_backward(std::vector<Tensor> grads_in, const Tensor& grad_sigma,
                                           std::vector<Tensor> weights_in, std::vector<Tensor> u_in,
                                           std::vector<Tensor> v_in, const Tensor& sigma) {
  const Shapes s(weights_in);
  const ScalarType dtype = weights_in[0].scalar_type();
  const auto weights = contiguous(weights_in, s, elements(s), dtype, "weights");
  const auto grads = contiguous(grads_in, s, elements(s), dtype, "grad_output");
  const auto u_given = contiguous(u_in, s, s.rows, dtype, "u");
  const auto v_given = contiguous(v_in, s, s.columns, dtype, "v");
  for (const Tensor& t : {sigma, grad_sigma})
    require(t.dim() == 1 && t.size(0) == s.layers() && t.scalar_type() == dtype,
            "sigma must have shape (", s.layers(), ",) and the dtype of weights");
  std::vector<Tensor> results;
  dispatch(weights[0], "weights", [&]<class T>(T) {
    using A = Acc<T>;
    const auto sigmas = values<T>(as_contiguous(sigma)), add = values<T>(as_contiguous(grad_sigma));
    std::vector<std::vector<A>> v;
    std::vector<T*> to;
    for (int64_t l = 0; l < s.layers(); ++l) {
      v.push_back(values<T>(v_given[l]));
      results.push_back(empty_like_dense(weights[l]));
      to.push_back(mutable_data<T>(results[l]));
    }
    std::vector<double> factors(s.layers());
    std::vector<A> parts(s.by_rows.size());
    for_units(s.by_rows, [&](const Unit& unit) {
      const int64_t width = s.columns[unit.layer], start = unit.first * width;
      const T *w = data<T>(weights[unit.layer]) + start, *g = data<T>(grads[unit.layer]) + start;
      parts[&unit - s.by_rows.data()] =
          sums_over<A, 1>(unit.last * width - start, [&](int64_t i, auto lanes, Vec<A>* sum) {
            sum[0] += load(w + i, lanes) * load(g + i, lanes);
          })[0];
    });
    for (size_t i = 0; i < parts.size(); ++i) factors[s.by_rows[i].layer] += parts[i];
    for (int64_t l = 0; l < s.layers(); ++l)
      factors[l] = add[l] - factors[l] / (static_cast<double>(sigmas[l]) * sigmas[l]);
    for_units(s.by_rows, [&](const Unit& unit) {
      const int64_t width = s.columns[unit.layer];
      const A divisor = sigmas[unit.layer];
      for (int64_t r = unit.first; r < unit.last; ++r) {
        const T* g = data<T>(grads[unit.layer]) + r * width;
        const A factor = load_n(data<T>(u_given[unit.layer]) + r, 1)[0] * factors[unit.layer];
        for_vectors<A>(width, [&](int64_t j, auto lanes) {
          const Vec<A> outer = load(v[unit.layer].data() + j, lanes) * factor;
          store(to[unit.layer] + r * width + j, load(g + j, lanes) / divisor + outer, lanes);
        });
      }
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

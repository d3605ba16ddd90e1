// RMS norm of every query and key head, then rotary position embedding (rotary.h), and backward.
#include "rotary.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Tokens whose weight gradients are added before they meet those of other tokens: by shape alone,
// so that the sum comes out the same for any number of threads.
constexpr int64_t kMaxBlocks = 64;

struct Sizes {
  int64_t seq, heads, head_dim, num_heads, tokens;
  double eps;

  Sizes(const Tensor& x, const Tensor& query_weight, const Tensor& key_weight, const Tensor& cos,
        const Tensor& sin, int64_t num_heads, double eps)
      : num_heads(num_heads), eps(eps) {
    require(x.dim() == 4, "query_key must have 4 dimensions");
    seq = x.size(1), heads = x.size(2), head_dim = x.size(3), tokens = x.size(0) * seq;
    for (const Tensor* w : {&query_weight, &key_weight})
      require(w->dim() == 1 && w->size(0) == head_dim && w->scalar_type() == x.scalar_type(),
              "weights must have shape (", head_dim, ",) and the dtype of query_key");
    check_angles(x, cos, sin);
    require(num_heads >= 0 && num_heads <= heads, "num_heads must be in [0, ", heads, "]");
  }
  int64_t token_size() const { return heads * head_dim; }
  template <class A>
  A factor(A squares) const {
    return 1 / std::sqrt(squares / head_dim + static_cast<A>(eps));
  }
};

// Calls f(T{}, rotation) with the types of x and of the angles.
template <class F>
void dispatch_angles(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                     bool inverse, F&& f) {
  dispatch(x, "query_key", [&]<class T>(T value) {
    if (cos.scalar_type() == x.scalar_type())
      f(value, Rotation<Acc<T>, T>(cos, sin, interleaved, inverse));
    else if constexpr (!std::is_same_v<T, double>)
      f(value, Rotation<Acc<T>, float>(cos, sin, interleaved, inverse));
  });
}

Tensor qk_norm_rotary(const Tensor& x_in, const Tensor& query_weight_in,
                      const Tensor& key_weight_in, const Tensor& cos_in, const Tensor& sin_in,
                      int64_t num_heads, double eps, bool interleaved) {
  const Sizes s(x_in, query_weight_in, key_weight_in, cos_in, sin_in, num_heads, eps);
  const Tensor x = with_dense_rows(x_in);
  const Tensor cos = with_dense_rows(cos_in), sin = with_dense_rows(sin_in);
  const Tensor query_weight = as_contiguous(query_weight_in);
  const Tensor key_weight = as_contiguous(key_weight_in);
  Tensor y = empty_contiguous_like(x);
  dispatch_angles(x, cos, sin, interleaved, false, [&]<class T>(T, const auto& rotation) {
    using A = Acc<T>;
    const HeadRows<T> heads(x);
    const T *query = data<T>(query_weight), *key = data<T>(key_weight);
    T* out = mutable_data<T>(y);
    torch::stable::parallel_for(
        0, s.tokens, grain_of(s.token_size()), [&](int64_t begin, int64_t end) {
          auto turns = rotation;
          const int64_t turned = turns.width();
          std::vector<A> row(s.head_dim);
          A* normed = row.data();
          for (int64_t i = begin; i < end; ++i) {
            turns.at(i / s.seq, i % s.seq, [&](const auto& turn) {
              const T* from = heads.at(i / s.seq, i % s.seq);
              T* to = out + i * s.token_size();
              for (int64_t h = 0; h < s.heads; ++h, from += heads.head, to += s.head_dim) {
                const auto [squares] =
                    sums_over<A, 1>(s.head_dim, [&](int64_t j, auto n, Vec<A>* sum) {
                      const Vec<A> v = load(from + j, n);
                      sum[0] += v * v;
                    });
                const A factor = s.factor(squares);
                const T* weight = h < s.num_heads ? query : key;
                for_vectors<A>(s.head_dim, [&](int64_t j, auto n) {
                  store(normed + j, load(from + j, n) * factor * load(weight + j, n), n);
                });
                turn(normed, to);
                for_vectors<A>(s.head_dim - turned, [&](int64_t j, auto n) {
                  store(to + turned + j, load(normed + turned + j, n), n);
                });
              }
            });
          }
        });
  });
  return y;
}

// With g = dy turned back and n = x / rms(x):
//   dx = (g * weight - n * mean(g * weight * n)) / rms(x)
//   dweight = sum over tokens and heads of g * n, or empty where it is not asked for
std::tuple<Tensor, Tensor, Tensor> qk_norm_rotary_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& query_weight_in,
    const Tensor& key_weight_in, const Tensor& cos_in, const Tensor& sin_in, int64_t num_heads,
    double eps, bool interleaved, bool weight_grad) {
  const Sizes s(x_in, query_weight_in, key_weight_in, cos_in, sin_in, num_heads, eps);
  check_like(dy_in, x_in, "grad_output", "query_key");
  const Tensor x = with_dense_rows(x_in), dy = with_dense_rows(dy_in);
  const Tensor cos = with_dense_rows(cos_in), sin = with_dense_rows(sin_in);
  const Tensor query_weight = as_contiguous(query_weight_in);
  const Tensor key_weight = as_contiguous(key_weight_in);
  const int64_t dim = s.head_dim,
                block = std::max<int64_t>(1, (s.tokens + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (s.tokens + block - 1) / block;
  Tensor dx = empty_contiguous_like(x);
  Tensor query_grad = empty({weight_grad ? dim : 0}, x.scalar_type());
  Tensor key_grad = empty({weight_grad ? dim : 0}, x.scalar_type());
  dispatch_angles(x, cos, sin, interleaved, true, [&]<class T>(T, const auto& rotation) {
    using A = Acc<T>;
    const HeadRows<T> heads(x), grads(dy);
    const T *query = data<T>(query_weight), *key = data<T>(key_weight);
    T* out = mutable_data<T>(dx);
    std::vector<double> partial(weight_grad ? blocks * 2 * dim : 0);  // [block][query, key][dim]
    const int64_t grain = grain_of(s.token_size() * block);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      auto turns = rotation;
      const int64_t turned = turns.width();
      std::vector<A> row(dim);
      A* g = row.data();
      for (int64_t i = begin * block; i < std::min(s.tokens, end * block); ++i) {
        turns.at(i / s.seq, i % s.seq, [&](const auto& turn) {
          const T *in = heads.at(i / s.seq, i % s.seq), *grad = grads.at(i / s.seq, i % s.seq);
          T* to = out + i * s.token_size();
          double* sums_of_block = weight_grad ? partial.data() + i / block * 2 * dim : nullptr;
          for (int64_t h = 0; h < s.heads; ++h, in += heads.head, grad += grads.head, to += dim) {
            const T* weight = h < s.num_heads ? query : key;
            double* sum = sums_of_block ? sums_of_block + (h < s.num_heads ? 0 : dim) : nullptr;
            turn(grad, g);
            for_vectors<A>(dim - turned, [&](int64_t j, auto n) {
              store(g + turned + j, load(grad + turned + j, n), n);
            });
            const auto [squares, products] =
                sums_over<A, 2>(dim, [&](int64_t j, auto n, Vec<A>* sums) {
                  const Vec<A> v = load(in + j, n);
                  sums[0] += v * v;
                  sums[1] += v * (load(g + j, n) * load(weight + j, n));
                });
            const A factor = s.factor(squares), mean = products * factor / dim;
            for_vectors<A>(dim, [&](int64_t j, auto n) {
              const Vec<A> normed = load(in + j, n) * factor, gradient = load(g + j, n);
              if (sum) add_to(sum + j, widen<A>(gradient * normed), n);
              store(to + j, (gradient * load(weight + j, n) - normed * mean) * factor, n);
            });
          }
        });
      }
    });
    if (!weight_grad) return;
    add_partial_sums(partial.data(), blocks, 2 * dim, dim, mutable_data<T>(query_grad));
    add_partial_sums(partial.data() + dim, blocks, 2 * dim, dim, mutable_data<T>(key_grad));
  });
  return {dx, query_grad, key_grad};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("qk_norm_rotary", TORCH_BOX(&qk_norm_rotary));
  m.impl("qk_norm_rotary_backward", TORCH_BOX(&qk_norm_rotary_backward));
}

}  // namespace
}  // namespace aigc_fast

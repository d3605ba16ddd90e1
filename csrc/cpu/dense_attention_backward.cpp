// The gradients of softmax(scale * Q K^T) V: of many queries, each of which meets every key, or
// those up to its own.
//
// With P the probabilities, G the gradient of the result and D its products with the result,
// dS = P * (G V^T - D): dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T G. Queries are rows once,
// and keys once: both take P and dS anew, seven products in place of five, but no two threads ever
// add to the same numbers.
#include "dense_attention.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Of the rows of one kind: `a` are their queries or keys, `b` their gradients or values; other_a
// and other_b those of the columns that they meet.
template <class T, class How, bool kRowsAreKeys>
class DenseGradient {
  using D = DenseProducts<T, How>;
  using A = typename D::A;
  using S = typename D::S;
  using V = Vec<A>;

 public:
  // lse and products with the result are (batch, heads, queries).
  DenseGradient(const DenseShape& s, const Tensor& a, const Tensor& b, const Tensor& other_a,
                const Tensor& other_b, const A* lse, const A* deltas, A scale, T* by_a, T* by_b)
      : s_(s),
        a_(a),
        b_(b),
        other_a_(other_a),
        other_b_(other_b),
        lse_(lse),
        deltas_(deltas),
        scale_(scale),
        by_a_(by_a),
        by_b_(by_b) {}

  void run() const {
    const int64_t heads = s_.batch * s_.kv_heads, size = column_heads() * head_size();
    const int64_t together = D::together(heads, size);
    const int64_t rows = a_.first.count, blocks = (rows + D::kRows - 1) / D::kRows;
    KeptBuffer<S> packed(together * size);
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t n = std::min(together, heads - first);
      in_parallel(n * column_heads() * kWeights, 4 * D::kGroup * other_a_.first.count,
                  [&](int64_t i) {
                    const int64_t head = first * column_heads() + i / kWeights, w = i % kWeights;
                    S* to = packed.data() + i / kWeights * head_size() + offset(w);
                    const auto weight = weight_of(head, w);
                    for (int64_t g = 0; g < D::groups(weight.outputs()); ++g) weight.pack(g, to);
                  });
      torch::stable::parallel_for(0, n * row_heads() * blocks, 1, [&](int64_t begin, int64_t end) {
        Rows some(*this);
        for (int64_t i = begin; i < end; ++i) {
          // From both ends in turns: the rows of a causal head have more columns and more.
          const int64_t j = i % blocks, block = j % 2 ? blocks - 1 - j / 2 : j / 2;
          const int64_t kv = i / (row_heads() * blocks), head = first + kv;
          some.run(packed.data() + kv * size, head / s_.kv_heads,
                   head % s_.kv_heads * row_heads() + i / blocks % row_heads(), block * D::kRows);
        }
      });
    }
  }

 private:
  static constexpr int kWeights = kRowsAreKeys ? 4 : 3;
  using Weights = typename D::Weights;
  int64_t row_heads() const { return kRowsAreKeys ? 1 : s_.group(); }
  int64_t column_heads() const { return kRowsAreKeys ? s_.group() : 1; }

  // 0: what meets a; 1: what meets b; 2: what dS meets; 3: what P meets.
  Weights weight_of(int64_t head, int64_t i) const {
    return {(i % 2 ? other_b_ : other_a_)[head], i > 1};
  }
  int64_t offset(int64_t i) const {
    int64_t sum = 0;
    for (int64_t w = 0; w < i; ++w) sum += weight_of(0, w).size();
    return sum;
  }
  int64_t head_size() const { return offset(kWeights); }

  // What a thread needs for some rows of a head.
  class Rows {
   public:
    explicit Rows(const DenseGradient& all)
        : all_(all),
          a_(D::kRows * D::depth(all.s_.dim)),
          b_(D::kRows * D::depth(all.s_.value_dim)),
          scores_(D::kBlocks * D::kColumns / D::kGroup),
          by_scores_(D::kBlocks * D::kColumns / D::kGroup),
          p_(kRowsAreKeys ? D::kRows * D::kColumns : 0),
          ds_(D::kRows * D::kColumns),
          by_a_(D::kBlocks * D::groups(all.s_.dim)),
          by_b_(kRowsAreKeys ? D::kBlocks * D::groups(all.s_.value_dim) : 0) {}

    void run(const S* packed, int64_t b, int64_t head, int64_t first) {
      const DenseShape& s = all_.s_;
      const int64_t rows = std::min(D::kRows, all_.a_.first.count - first);
      D::take_rows(all_.a_.of(b, head), first, rows, a_.data());
      D::take_rows(all_.b_.of(b, head), first, rows, b_.data());
      const int64_t columns = all_.other_a_.first.count;
      const int64_t begin = kRowsAreKeys && s.causal ? first / D::kGroup * D::kGroup : 0;
      const int64_t end = !kRowsAreKeys && s.causal ? std::min(columns, first + rows) : columns;
      bool more = false;
      for (int64_t h = 0; h < all_.column_heads(); ++h, packed += all_.head_size()) {
        const int64_t query_head = kRowsAreKeys ? head * s.group() + h : head;
        const int64_t at = (b * s.heads + query_head) * s.queries;
        for (int64_t k = begin; k < end; k += D::kColumns, more = true) {
          const int64_t n = std::min(D::kColumns, end - k);
          D::multiply_tokens(a_.data(), s.dim, rows, packed + k * D::depth(s.dim), n,
                             scores_.data());
          D::multiply_tokens(b_.data(), s.value_dim, rows,
                             packed + all_.offset(1) + k * D::depth(s.value_dim), n,
                             by_scores_.data());
          for (int64_t r = 0; r < rows; ++r)
            differentiate(r, n, at + (kRowsAreKeys ? k : first + r),
                          s.causal ? first + r - k : (kRowsAreKeys ? 0 : n));
          D::add_features(ds_.data(), n, rows, packed + all_.offset(2) + k * D::kGroup, columns,
                          s.dim, more, nullptr, by_a_.data());
          if constexpr (kRowsAreKeys)
            D::add_features(p_.data(), n, rows, packed + all_.offset(3) + k * D::kGroup, columns,
                            s.value_dim, more, nullptr, by_b_.data());
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (b * all_.a_.first.count + first + r) * all_.a_.heads + head;
        put(by_a_.data(), r, s.dim, more ? all_.scale_ : 0, all_.by_a_ + at * s.dim);
        if constexpr (kRowsAreKeys)
          put(by_b_.data(), r, s.value_dim, more ? 1 : 0, all_.by_b_ + at * s.value_dim);
      }
    }

   private:
    // Of a row that met nothing the sums were never written.
    static void put(const ConvSums<A>* sums, int64_t row, int64_t features, A factor, T* to) {
      if (factor == 0) return (void)std::fill_n(to, features, T(0));
      D::put(sums, row, features, factor, to);
    }

    // P and dS of a row and n columns; lse and deltas begin at `at`, that of the row's query or of
    // the first column's. Of a causal row the columns up to `own` count, or those from it on.
    void differentiate(int64_t row, int64_t n, int64_t at, int64_t own) {
      for (int64_t k = 0; k < D::depth(n); k += D::L) {
        V lse, delta;
        if constexpr (kRowsAreKeys) {
          const int some = std::min(D::L, n - k);
          lse = load(all_.lse_ + at + k, some), delta = load(all_.deltas_ + at + k, some);
        } else {
          lse = broadcast(all_.lse_[at]), delta = broadcast(all_.deltas_[at]);
        }
        const V scores = D::scaled(load(D::at(scores_.data(), row, k)), all_.scale_);
        const V above = scores - lse;  // not zero or less where they are hidden
        V p = exp_of_negative<A>(above > 0 ? V{} : above);
        V ds = p * (load(D::at(by_scores_.data(), row, k)) - delta);
        const int64_t low = kRowsAreKeys ? own - k : 0, high = kRowsAreKeys ? n - k : own + 1 - k;
        if (low > 0 || std::min(high, n - k) < D::L)
          for (int64_t lane = 0; lane < D::L; ++lane)
            if (lane < low || lane >= high || lane >= n - k) p[lane] = ds[lane] = 0;
        if constexpr (kRowsAreKeys) store(p_.data() + row * D::kColumns + k, p);
        store(ds_.data() + row * D::kColumns + k, ds);
      }
    }

    const DenseGradient& all_;
    KeptBuffer<S> a_, b_;
    KeptBuffer<ConvSums<A>> scores_, by_scores_;
    KeptBuffer<S> p_, ds_;
    KeptBuffer<ConvSums<A>> by_a_, by_b_;
  };

  const DenseShape s_;
  const Heads<T> a_, b_, other_a_, other_b_;
  const A *lse_, *deltas_;
  const A scale_;
  T *by_a_, *by_b_;
};

// x, whose features lie side by side.
Tensor with_rows(const Tensor& x) { return x.stride(3) == 1 ? x : as_contiguous(x); }

// The products of every query's gradient with its result, (batch, heads, queries).
template <class T>
std::vector<Acc<T>> products_of(const Tensor& grad, const Tensor& out) {
  using A = Acc<T>;
  const int64_t queries = out.size(1), heads = out.size(2), features = out.size(3);
  const Heads<T> grads(grad), results(out);
  std::vector<A> found(out.size(0) * heads * queries);
  in_parallel(found.size(), features, [&](int64_t i) {
    const Tokens<T> g = grads[i / queries], y = results[i / queries];
    const int64_t q = i % queries;
    found[i] = sums_over<A, 1>(features, [&](int64_t f, auto n, Vec<A>* sum) {
      sum[0] += load(g.data + q * g.token + f, n) * load(y.data + q * y.token + f, n);
    })[0];
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor> dense_attention_backward(
    const Tensor& grad_in, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out_in, const Tensor& lse_in, double scale, bool causal, bool query_grad,
    bool key_value_grad) {
  const DenseShape s = dense_shape(query, key, value, causal);
  const ScalarType dtype = query.scalar_type();
  require(grad_in.dim() == 4 && same_shape(grad_in, out_in) && grad_in.scalar_type() == dtype &&
              out_in.scalar_type() == dtype,
          "grad and out must have one shape and the dtype of query");
  require(out_in.size(0) == s.batch && out_in.size(1) == s.queries && out_in.size(2) == s.heads &&
              out_in.size(3) == s.value_dim && lse_in.numel() == s.batch * s.heads * s.queries,
          "out and lse must fit query and value");
  auto like = [&](bool wanted, const Tensor& x) {
    return wanted ? empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype) : empty({0}, dtype);
  };
  Tensor by_query = like(query_grad, query);
  Tensor by_key = like(key_value_grad, key), by_value = like(key_value_grad, value);
  const Tensor lse = as_contiguous(lse_in);
  const Tensor grad = with_rows(grad_in), out = with_rows(out_in);
  dispatch(query, "query", [&]<class T>(T) {
    using A = Acc<T>;
    const std::vector<A> deltas = products_of<T>(grad, out);
    with_dense_products<T>([&]<class How>(std::type_identity<How>) {
      if (query_grad)
        DenseGradient<T, How, false>(s, query, grad, key, value, data<A>(lse), deltas.data(), scale,
                                     mutable_data<T>(by_query), nullptr)
            .run();
      if (key_value_grad)
        DenseGradient<T, How, true>(s, key, value, query, grad, data<A>(lse), deltas.data(), scale,
                                    mutable_data<T>(by_key), mutable_data<T>(by_value))
            .run();
    });
  });
  return {by_query, by_key, by_value};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("dense_attention_backward", TORCH_BOX(&dense_attention_backward));
}

}  // namespace
}  // namespace aigc_fast

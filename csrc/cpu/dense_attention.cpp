// softmax(scale * Q K^T) V for many queries, each of which meets every key, or those up to its own.
//
// Keys are the weights of queries, values those of probabilities, both packed once for all queries
// of a head. The scores of some rows with a block of keys stay in the second cache; what earlier
// blocks gave is scaled when a larger score comes.
#include "dense_attention.h"

namespace aigc_fast {
namespace {

template <class T, class How>
class DenseAttention {
  using D = DenseProducts<T, How>;
  using A = typename D::A;
  using S = typename D::S;
  using V = Vec<A>;

 public:
  DenseAttention(const DenseShape& s, const Tensor& query, const Tensor& key, const Tensor& value,
                 A scale, T* out, A* lse)
      : s_(s), query_(query), key_(key), value_(value), scale_(scale), out_(out), lse_(lse) {}

  void run() const {
    const int64_t heads = s_.batch * s_.kv_heads, blocks = (s_.queries + D::kRows - 1) / D::kRows;
    const int64_t size = keys_of(0).size() + values_of(0).size();
    const int64_t together = D::together(heads, size);
    const int64_t of_keys = D::groups(s_.keys), all = of_keys + D::groups(s_.value_dim);
    KeptBuffer<S> packed(together * size);
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t n = std::min(together, heads - first);
      in_parallel(n * all, D::kGroup * s_.keys, [&](int64_t i) {
        const int64_t head = i / all, group = i % all;
        S* to = packed.data() + head * size;
        if (group < of_keys)
          keys_of(first + head).pack(group, to);
        else
          values_of(first + head).pack(group - of_keys, to + keys_of(0).size());
      });
      torch::stable::parallel_for(0, n * s_.group() * blocks, 1, [&](int64_t begin, int64_t end) {
        Rows rows(*this);
        for (int64_t i = begin; i < end; ++i) {
          // From both ends in turns: the last rows of a causal head have the most keys.
          const int64_t j = i % blocks, block = j % 2 ? blocks - 1 - j / 2 : j / 2;
          const int64_t kv = i / (s_.group() * blocks), head = first + kv;
          rows.run(packed.data() + kv * size, head / s_.kv_heads,
                   head % s_.kv_heads * s_.group() + i / blocks % s_.group(), block * D::kRows);
        }
      });
    }
  }

 private:
  using Weights = typename D::Weights;
  Weights keys_of(int64_t head) const { return {key_[head], false}; }
  Weights values_of(int64_t head) const { return {value_[head], true}; }

  // What a thread needs for some rows of a head.
  class Rows {
   public:
    explicit Rows(const DenseAttention& all)
        : all_(all),
          s_(all.s_),
          query_(D::kRows * D::depth(s_.dim)),
          scores_(D::kBlocks * D::kColumns / D::kGroup),
          probabilities_(D::kRows * D::kColumns),
          sums_(D::kBlocks * D::groups(s_.value_dim)) {}

    void run(const S* packed, int64_t b, int64_t head, int64_t first) {
      const int64_t rows = std::min(D::kRows, s_.queries - first);
      D::take_rows(all_.query_.of(b, head), first, rows, query_.data());
      std::fill_n(largest_, D::kRows, kLowest);
      std::fill_n(total_, D::kRows, A(0));
      const S* values = packed + all_.keys_of(0).size();
      const int64_t end = s_.causal ? std::min(s_.keys, first + rows) : s_.keys;
      for (int64_t k = 0; k < end; k += D::kColumns) {
        const int64_t keys = std::min(D::kColumns, end - k);
        D::multiply_tokens(query_.data(), s_.dim, rows, packed + k * D::depth(s_.dim), keys,
                           scores_.data());
        for (int64_t r = 0; r < rows; ++r)
          decay_[r] = weigh(r, keys, s_.causal ? std::min(keys, first + r + 1 - k) : keys);
        D::add_features(probabilities_.data(), keys, rows, values + k * D::kGroup, s_.keys,
                        s_.value_dim, k > 0, decay_, sums_.data());
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (b * s_.queries + first + r) * s_.heads + head;
        D::put(sums_.data(), r, s_.value_dim, 1 / total_[r], all_.out_ + at * s_.value_dim);
        all_.lse_[(b * s_.heads + head) * s_.queries + first + r] =
            largest_[r] + std::log(total_[r]);
      }
    }

   private:
    static constexpr A kLowest = -std::numeric_limits<A>::infinity();

    // Probabilities of a row, before they are divided by their total: those of keys from `visible`
    // on are zero. Returns the factor for what was there before.
    A weigh(int64_t row, int64_t keys, int64_t visible) {
      const auto scores = [&](int64_t k) {  // of L keys
        V v = D::scaled(load(D::at(scores_.data(), row, k)), all_.scale_);
        for (int64_t lane = std::max<int64_t>(0, visible - k); lane < D::L; ++lane)
          v[lane] = kLowest;
        return v;
      };
      V top = broadcast(largest_[row]);
      for (int64_t k = 0; k < visible; k += D::L) top = max<A>(top, scores(k));
      A now = largest_[row];
      for (int lane = 0; lane < D::L; ++lane) now = std::max(now, top[lane]);
      // A row that sees none of these keys, or scores of -inf alone.
      const A base = now == kLowest ? A(0) : now;
      V sum = {};
      S* to = probabilities_.data() + row * D::kColumns;
      for (int64_t k = 0; k < D::depth(keys); k += D::L) {
        const V p = k < visible ? exp_of_negative<A>(scores(k) - base) : V{};
        store(to + k, p);
        sum += p;
      }
      const A decay = exp_of_negative<A>(broadcast(largest_[row] - base))[0];
      total_[row] = total_[row] * decay + sum_lanes<A>(sum);
      largest_[row] = now;
      return decay;
    }

    const DenseAttention& all_;
    const DenseShape& s_;
    KeptBuffer<S> query_;
    KeptBuffer<ConvSums<A>> scores_;
    KeptBuffer<S> probabilities_;
    KeptBuffer<ConvSums<A>> sums_;
    A largest_[D::kRows], total_[D::kRows], decay_[D::kRows];
  };

  const DenseShape s_;
  const Heads<T> query_, key_, value_;
  const A scale_;
  T* out_;
  A* lse_;
};

std::tuple<Tensor, Tensor> dense_attention(const Tensor& query, const Tensor& key,
                                           const Tensor& value, double scale, bool causal) {
  const DenseShape s = dense_shape(query, key, value, causal);
  const ScalarType dtype = query.scalar_type();
  Tensor out = empty({s.batch, s.queries, s.heads, s.value_dim}, dtype);
  Tensor lse =
      empty({s.batch, s.heads, s.queries}, dtype == ScalarType::Double ? dtype : ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  dispatch(query, "query", [&]<class T>(T) {
    with_dense_products<T>([&]<class How>(std::type_identity<How>) {
      DenseAttention<T, How>(s, query, key, value, scale, mutable_data<T>(out),
                             mutable_data<Acc<T>>(lse))
          .run();
    });
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
}

}  // namespace
}  // namespace aigc_fast

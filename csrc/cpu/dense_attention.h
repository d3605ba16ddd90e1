// What attention of many queries and its gradient have in common: matrices of tokens, which meet as
// rows and weights of the products of convolutions.
#pragma once

#include "conv_products.h"
#include "vector_pair.h"

namespace aigc_fast {

struct DenseShape {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  bool causal;

  int64_t group() const { return heads / kv_heads; }
};

// The features of the tokens of one head.
template <class T>
struct Tokens {
  const T* data;
  int64_t count, features, token, element;  // the last two are strides
};

// (batch, tokens, heads, features), of any strides. A tensor is asked for them once: each question
// takes longer than a row of products.
template <class T>
struct Heads {
  Tokens<T> first;
  int64_t heads, batch_stride, head_stride;

  explicit Heads(const Tensor& x)
      : first{data<T>(x), x.size(1), x.size(3), x.stride(1), x.stride(3)},
        heads(x.size(2)),
        batch_stride(x.stride(0)),
        head_stride(x.stride(2)) {}
  Tokens<T> of(int64_t b, int64_t head) const {
    Tokens<T> found = first;
    found.data += b * batch_stride + head * head_stride;
    return found;
  }
  // That of number i among the heads of all sequences.
  Tokens<T> operator[](int64_t i) const { return of(i / heads, i % heads); }
};

template <class T, class How>
struct DenseProducts {
  using Products = VectorProducts<T, How>;
  using A = typename How::A;
  using S = typename How::S;
  static constexpr int64_t L = kLanes<A>, kGroup = Products::kGroup, kPixels = Products::kPixels;
  static constexpr int64_t kBlocks = 4,
                           kRows = kBlocks * kPixels;  // rows that meet the same weights
  static constexpr int64_t kColumns = 1024;            // most columns of their products
  static constexpr int64_t kPackedBytes = 4 << 20;     // of heads together: they stay in a cache
  static_assert(kColumns % kGroup == 0 && kGroup % L == 0 && L % How::kStep == 0);

  static int64_t depth(int64_t terms) { return round_up(terms, How::kStep); }
  static int64_t groups(int64_t outputs) { return (outputs + kGroup - 1) / kGroup; }

  // Heads whose weights, of `size` elements each, are packed at a time.
  static int64_t together(int64_t heads, int64_t size) {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), heads);
    const int64_t bytes =
        std::max<int64_t>(1, size * sizeof(S));  // none where there are no queries
    return std::clamp<int64_t>(kPackedBytes / bytes, threads, heads);
  }

  // Weights whose outputs are tokens and terms features, [group of outputs][term][kGroup], or,
  // transposed, the other way.
  struct Weights {
    Tokens<T> tokens;
    bool transposed;

    int64_t outputs() const { return transposed ? tokens.features : tokens.count; }
    int64_t terms() const { return transposed ? tokens.count : tokens.features; }
    int64_t size() const { return groups(outputs()) * kGroup * depth(terms()); }
    void pack(int64_t group, S* to) const {
      const auto [by_output, by_term] = transposed ? std::pair(tokens.element, tokens.token)
                                                   : std::pair(tokens.token, tokens.element);
      pack_outputs<kGroup, How::kStep>(ConvWeight<T>{tokens.data, by_output, by_term, 1},
                                       ConvSize{terms(), outputs(), 1}, group * kGroup,
                                       std::min(kGroup, outputs() - group * kGroup), depth(terms()),
                                       to + group * kGroup * depth(terms()));
    }
  };

  // Tokens first, ..., first + rows - 1 as rows of depth(features), zero behind the last feature.
  static void take_rows(const Tokens<T>& x, int64_t first, int64_t rows, S* to) {
    const int64_t pitch = depth(x.features);
    std::memset(static_cast<void*>(to), 0, kRows * pitch * sizeof(S));
    for (int64_t r = 0; r < rows; ++r, to += pitch) {
      const T* from = x.data + (first + r) * x.token;
      if (x.element == 1)
        copy_channels(to, from, x.features);
      else
        for (int64_t i = 0; i < x.features; ++i) copy_one(to + i, from + i * x.element);
    }
  }

  // The products of `rows` rows of `terms` values, `pitch` apart, with a group of weights.
  static void multiply(const S* from, int64_t pitch, int64_t terms, int64_t rows, const S* weight,
                       ConvSums<A>* to) {
    for (int64_t c = 0; c < terms; c += How::kChain)
      for (int64_t r = 0; r < rows; r += kPixels)
        Products::sum_pixels(from + r * pitch + c, std::min(How::kChain, terms - c), pitch,
                             rows - r, weight + c * kGroup, c > 0, to[r / kPixels]);
  }

  // Those of rows with `columns` tokens: [group of columns][block of rows][row][kGroup].
  static void multiply_tokens(const S* from, int64_t features, int64_t rows, const S* weight,
                              int64_t columns, ConvSums<A>* to) {
    const int64_t pitch = depth(features);
    for (int64_t k = 0; k < columns; k += kGroup, weight += kGroup * pitch, to += kBlocks)
      multiply(from, pitch, pitch, rows, weight, to);
  }
  // scale * products, rounded as those that one was the largest of: fused with a subtraction that
  // follows, the largest less itself would be what rounding took from it, not zero.
  static Vec<A> scaled(Vec<A> products, A scale) {
    Vec<A> scores = products * scale;
    asm("" : "+v"(scores));  // stays in its register
    return scores;
  }
  // Where the first of them, of L columns of a row, are.
  static const A* at(const ConvSums<A>* products, int64_t row, int64_t column) {
    const A* group = reinterpret_cast<const A*>(products + column / kGroup * kBlocks);
    return group + row * kGroup + column % kGroup;
  }

  // Adds the products of rows of `columns` factors, kColumns apart, with the features of as many
  // tokens, of `tokens` in all, to sums * decay, [group of features][block of rows][row][kGroup].
  static void add_features(const S* from, int64_t columns, int64_t rows, const S* weight,
                           int64_t tokens, int64_t features, bool more, const A* decay,
                           ConvSums<A>* sums) {
    ConvSums<A> some[kBlocks];
    for (int64_t g = 0; g < groups(features); ++g, weight += kGroup * depth(tokens)) {
      multiply(from, kColumns, depth(columns), rows, weight, some);
      const A* added = reinterpret_cast<const A*>(some);
      A* total = reinterpret_cast<A*>(sums + g * kBlocks);
      for (int64_t i = 0; i < rows * kGroup; i += L) {
        const Vec<A> v = load(added + i);
        store(total + i, more ? load(total + i) * (decay ? decay[i / kGroup] : 1) + v : v);
      }
    }
  }

  // to[i] = factor * sums of a row, of all features.
  static void put(const ConvSums<A>* sums, int64_t row, int64_t features, A factor, T* to) {
    for (int64_t f = 0; f < features; f += kGroup)
      for_vectors<A>(std::min(kGroup, features - f), [&](int64_t i, auto n) {
        store(to + f + i, load(at(sums, row, f + i)) * factor, n);
      });
  }
};

// Calls f with a value of type std::type_identity of how T is multiplied here.
template <class T, class F>
void with_dense_products(F&& f) {
#if AIGC_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>)
    if (has_bf16_dot()) return f(std::type_identity<Bf16Dot>{});
#endif
  f(std::type_identity<MultiplyAdd<T>>{});
}

// The sizes, checked.
inline DenseShape dense_shape(const Tensor& query, const Tensor& key, const Tensor& value,
                              bool causal) {
  for (const Tensor& x : {query, key, value}) {
    require(x.dim() == 4, "query, key and value must have 4 dimensions");
    require(x.scalar_type() == query.scalar_type(), "key and value must have the dtype of query");
    require(x.size(0) == query.size(0), "key and value must have the batch of query");
  }
  const DenseShape s{query.size(0), query.size(2), key.size(2),   query.size(1),
                     key.size(1),   query.size(3), value.size(3), causal};
  require(key.size(3) == s.dim && value.size(1) == s.keys && value.size(2) == s.kv_heads,
          "key and value must fit query");
  require(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "query must have a multiple of the heads");
  require(s.keys > 0 && s.dim > 0 && s.value_dim > 0,
          "key and value must have tokens and features");
  return s;
}

}  // namespace aigc_fast

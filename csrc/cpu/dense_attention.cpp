// softmax(scale * Q K^T) V for many queries, each of which meets every key, or those up to its own.
//
// Two products of matrices, by the registers of convolutions: keys are the weights of queries,
// values those of probabilities, both packed once for all queries of a head. The scores of an
// item's rows with a block of keys stay in the second cache; what earlier blocks gave is scaled
// when a larger score comes.
#include "conv_products.h"
#include "vector_pair.h"

namespace aigc_fast {
namespace {

struct DenseShape {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  bool causal;
};

// The elements of (batch, tokens, heads, head_dim), of any strides.
template <class T>
struct Tokens {
  const T* data;
  int64_t batch, token, head, element;

  explicit Tokens(const Tensor& x)
      : data(aigc_fast::data<T>(x)),
        batch(x.stride(0)),
        token(x.stride(1)),
        head(x.stride(2)),
        element(x.stride(3)) {}
  const T* of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

template <class T, class How>
class DenseAttention {
  using Products = VectorProducts<T, How>;
  using A = typename How::A;
  using S = typename How::S;
  using V = Vec<A>;

 public:
  DenseAttention(const DenseShape& s, const Tensor& query, const Tensor& key, const Tensor& value,
                 A scale, T* out)
      : s_(s), query_(query), key_(key), value_(value), scale_(scale), out_(out) {}

  void run() const {
    const int64_t heads = s_.batch * s_.kv_heads, size = key_size() + value_size();
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), heads);
    const int64_t together = std::clamp<int64_t>(kPackedBytes / (size * sizeof(S)), threads, heads);
    const int64_t group = s_.heads / s_.kv_heads, blocks = (s_.queries + kRows - 1) / kRows;
    KeptBuffer<S> packed(together * size);
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t n = std::min(together, heads - first);
      in_parallel(n * (key_groups() + value_groups()), kGroup * s_.keys, [&](int64_t i) {
        S* to = packed.data() + i / (key_groups() + value_groups()) * size;
        pack(first + i / (key_groups() + value_groups()), i % (key_groups() + value_groups()), to);
      });
      torch::stable::parallel_for(0, n * group * blocks, 1, [&](int64_t begin, int64_t end) {
        Item item(*this);
        for (int64_t i = begin; i < end; ++i) {
          // From both ends in turns: the last rows of a causal head have the most keys.
          const int64_t j = i % blocks, block = j % 2 ? blocks - 1 - j / 2 : j / 2;
          const int64_t kv = i / (group * blocks), head = first + kv;
          item.run(packed.data() + kv * size, head / s_.kv_heads,
                   head % s_.kv_heads * group + i / blocks % group, block * kRows);
        }
      });
    }
  }

 private:
  static constexpr int64_t L = kLanes<A>, kGroup = Products::kGroup, kPixels = Products::kPixels;
  static constexpr int64_t kBlocks = 4, kRows = kBlocks * kPixels;  // query rows of an item
  static constexpr int64_t kKeys = 1024;                            // most keys of a block
  static constexpr int64_t kPackedBytes = 4 << 20;  // of heads together: they stay in a cache
  static_assert(kKeys % kGroup == 0 && kGroup % L == 0 && L % How::kStep == 0);

  int64_t depth() const { return round_up(s_.dim, How::kStep); }
  int64_t all_keys() const { return round_up(s_.keys, How::kStep); }
  int64_t key_groups() const { return (s_.keys + kGroup - 1) / kGroup; }
  int64_t value_groups() const { return (s_.value_dim + kGroup - 1) / kGroup; }
  int64_t key_size() const { return key_groups() * kGroup * depth(); }
  int64_t value_size() const { return value_groups() * kGroup * all_keys(); }

  // Group i of a head: of its keys, or of the features of its values.
  void pack(int64_t head, int64_t i, S* to) const {
    const int64_t b = head / s_.kv_heads, h = head % s_.kv_heads;
    if (i < key_groups()) {
      const ConvWeight<T> keys{key_.of(b, h), key_.token, key_.element, 1};
      pack_outputs<kGroup, How::kStep>(keys, ConvSize{s_.dim, s_.keys, 1}, i * kGroup,
                                       std::min(kGroup, s_.keys - i * kGroup), depth(),
                                       to + i * kGroup * depth());
    } else {
      i -= key_groups();
      const ConvWeight<T> values{value_.of(b, h), value_.element, value_.token, 1};
      pack_outputs<kGroup, How::kStep>(values, ConvSize{s_.keys, s_.value_dim, 1}, i * kGroup,
                                       std::min(kGroup, s_.value_dim - i * kGroup), all_keys(),
                                       to + key_size() + i * kGroup * all_keys());
    }
  }

  // What a thread needs for kRows rows of a head.
  class Item {
   public:
    explicit Item(const DenseAttention& all)
        : all_(all),
          s_(all.s_),
          query_(kRows * all.depth()),
          scores_(kBlocks * kKeys / kGroup),
          probabilities_(kRows * kKeys),
          sums_(kBlocks * all.value_groups()) {}

    void run(const S* packed, int64_t b, int64_t head, int64_t first) {
      const int64_t rows = std::min(kRows, s_.queries - first);
      take_queries(all_.query_.of(b, head) + first * all_.query_.token, rows);
      std::fill_n(largest_, kRows, -std::numeric_limits<A>::infinity());
      std::fill_n(total_, kRows, A(0));
      const int64_t end = s_.causal ? std::min(s_.keys, first + rows) : s_.keys;
      for (int64_t k = 0; k < end; k += kKeys) {
        const int64_t keys = std::min(kKeys, end - k);
        score(packed + k * all_.depth(), keys, rows);
        for (int64_t r = 0; r < rows; ++r)
          decay_[r] = weigh(r, keys, s_.causal ? std::min(keys, first + r + 1 - k) : keys);
        add_values(packed + all_.key_size() + k * kGroup, keys, rows, k > 0);
      }
      for (int64_t r = 0; r < rows; ++r)
        put(r, all_.out_ + ((b * s_.queries + first + r) * s_.heads + head) * s_.value_dim);
    }

   private:
    void take_queries(const T* from, int64_t rows) {
      const int64_t depth = all_.depth();
      std::memset(static_cast<void*>(query_.data()), 0, kRows * depth * sizeof(S));
      for (int64_t r = 0; r < rows; ++r, from += all_.query_.token) {
        S* to = query_.data() + r * depth;
        if (all_.query_.element == 1)
          copy_channels(to, from, s_.dim);
        else
          for (int64_t d = 0; d < s_.dim; ++d) copy_one(to + d, from + d * all_.query_.element);
      }
    }

    // Scores of all rows with `keys` keys: [group of keys][block of rows][row][kGroup].
    void score(const S* packed, int64_t keys, int64_t rows) {
      const int64_t depth = all_.depth();
      ConvSums<A>* to = scores_.data();
      for (int64_t k = 0; k < keys; k += kGroup, packed += kGroup * depth, to += kBlocks)
        multiply(query_.data(), depth, depth, rows, packed, to);
    }

    // Probabilities of a row, before they are divided by their total: those of keys from `visible`
    // on are zero. Returns the factor for what was there before.
    A weigh(int64_t row, int64_t keys, int64_t visible) {
      const A lowest = -std::numeric_limits<A>::infinity();
      const auto scores = [&](int64_t k) {  // of L keys
        const A* group = reinterpret_cast<const A*>(&scores_.data()[k / kGroup * kBlocks]);
        V v = load(group + row * kGroup + k % kGroup) * all_.scale_;
        for (int64_t lane = std::max<int64_t>(0, visible - k); lane < L; ++lane) v[lane] = lowest;
        return v;
      };
      V top = broadcast(largest_[row]);
      for (int64_t k = 0; k < visible; k += L) top = max<A>(top, scores(k));
      A now = largest_[row];
      for (int lane = 0; lane < L; ++lane) now = std::max(now, top[lane]);
      // A row that sees none of these keys, or scores of -inf alone.
      const A base = now == lowest ? A(0) : now;
      V sum = {};
      S* to = probabilities_.data() + row * kKeys;
      for (int64_t k = 0; k < round_up(keys, How::kStep); k += L) {
        const V p = k < visible ? exp_of_negative<A>(scores(k) - base) : V{};
        store(to + k, p);
        sum += p;
      }
      const A decay = exp_of_negative<A>(broadcast(largest_[row] - base))[0];
      total_[row] = total_[row] * decay + sum_lanes<A>(sum);
      largest_[row] = now;
      return decay;
    }

    void add_values(const S* packed, int64_t keys, int64_t rows, bool more) {
      ConvSums<A> some[kBlocks];
      ConvSums<A>* sums = sums_.data();
      for (int64_t g = 0; g < all_.value_groups(); ++g, sums += kBlocks) {
        multiply(probabilities_.data(), kKeys, round_up(keys, How::kStep), rows, packed, some);
        packed += kGroup * all_.all_keys();
        const A* added = reinterpret_cast<const A*>(some);
        A* total = reinterpret_cast<A*>(sums);
        for (int64_t i = 0; i < rows * kGroup; i += L) {
          const V v = load(added + i);
          store(total + i, more ? load(total + i) * decay_[i / kGroup] + v : v);
        }
      }
    }

    // The products of `rows` rows, `pitch` apart, of `depth` values with a group of weights.
    static void multiply(const S* from, int64_t pitch, int64_t depth, int64_t rows, const S* weight,
                         ConvSums<A>* to) {
      for (int64_t c = 0; c < depth; c += How::kChain)
        for (int64_t r = 0; r < rows; r += kPixels)
          Products::sum_pixels(from + r * pitch + c, std::min(How::kChain, depth - c), pitch,
                               rows - r, weight + c * kGroup, c > 0, to[r / kPixels]);
    }

    void put(int64_t row, T* to) const {
      for (int64_t d = 0; d < s_.value_dim; d += kGroup) {
        const A* sums = reinterpret_cast<const A*>(&sums_.data()[d / kGroup * kBlocks]);
        for_vectors<A>(std::min(kGroup, s_.value_dim - d), [&](int64_t i, auto n) {
          store(to + d + i, load(sums + row * kGroup + i) / total_[row], n);
        });
      }
    }

    const DenseAttention& all_;
    const DenseShape& s_;
    KeptBuffer<S> query_;
    KeptBuffer<ConvSums<A>> scores_;
    KeptBuffer<S> probabilities_;
    KeptBuffer<ConvSums<A>> sums_;  // [group of features][block of rows][row][kGroup]
    A largest_[kRows], total_[kRows], decay_[kRows];
  };

  const DenseShape s_;
  const Tokens<T> query_, key_, value_;
  const A scale_;
  T* out_;
};

Tensor dense_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
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
  require(s.keys > 0 && s.dim > 0, "key must have tokens and features");
  Tensor out = empty({s.batch, s.queries, s.heads, s.value_dim}, query.scalar_type());
  if (out.numel() == 0) return out;
  dispatch(query, "query", [&]<class T>(T) {
    const auto run = [&]<class How>(std::type_identity<How>) {
      DenseAttention<T, How>(s, query, key, value, scale, mutable_data<T>(out)).run();
    };
#if AIGC_BF16_DOT
    if constexpr (std::is_same_v<T, bf16>)
      if (has_bf16_dot()) return run(std::type_identity<Bf16Dot>{});
#endif
    run(std::type_identity<MultiplyAdd<T>>{});
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
}

}  // namespace
}  // namespace aigc_fast

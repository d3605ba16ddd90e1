// softmax(scale * Q K^T) V over a key/value cache.
//
// Work is cut into units of (sequence, split of the cache, key/value head, chunk of query rows).
// The rows of a unit are all the query heads of its group and all its new tokens, so that each
// element of the caches is read and converted once for all of them. A unit walks its keys in
// blocks that stay in the L1 cache: scores, softmax with a running maximum, then values. Its
// result (maximum, sum, weighted values) is merged with those of the other splits at the end.
// Nothing in this partition depends on the number of threads, so the bits do not either.
//
// Rows go in tiles of R, and a score tile is one vector of L / R keys x R rows: L dot products
// are summed over their lanes together, at 3 instructions a product instead of 8.
#include "tensor.h"

#include <memory>
#include <utility>

namespace aigc_fast {
namespace {

constexpr int64_t kBlock = 32;   // keys between two looks at the running maximum
constexpr int64_t kSplit = 256;  // keys of a unit, for up to kRows rows
constexpr int64_t kRows = 32;    // rows of a unit

// ---- pairs of vectors -----------------------------------------------------------------------

// 2 * lanes elements from p, in the order that takes the fewest instructions: query, keys and
// values all come this way, and store_pair restores the order. For bf16: even, then odd elements.
template <class T, class V = Vec<Acc<T>>>
AIGC_INLINE void load_pair(const T* p, V& a, V& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
    U32 raw;
    std::memcpy(&raw, p, sizeof raw);
    a = reinterpret_cast<V>(raw << 16);
    b = reinterpret_cast<V>(raw & 0xffff0000u);
  } else {
    a = load(p);
    b = load(p + kLanes<Acc<T>>);
  }
}

template <class T, class V = Vec<Acc<T>>>
AIGC_INLINE void load_pair(const T* p, int64_t n, V& a, V& b) {
  if (n == 2 * kLanes<Acc<T>>) return load_pair(p, a, b);
  T buffer[2 * kLanes<Acc<T>>] = {};
  std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
  load_pair(buffer, a, b);
}

template <class T, class V = Vec<Acc<T>>>
AIGC_INLINE void store_pair(T* p, V a, V b, int64_t n) {
  constexpr int lanes = kLanes<Acc<T>>;
  T buffer[2 * lanes];
  store(buffer, a);
  store(buffer + lanes, b);
  if constexpr (std::is_same_v<T, bf16>) {
    T mixed[2 * lanes];
    for (int i = 0; i < lanes; ++i) {
      mixed[2 * i] = buffer[i];
      mixed[2 * i + 1] = buffer[lanes + i];
    }
    std::memcpy(static_cast<void*>(p), mixed, n * sizeof(T));
  } else {
    std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
  }
}

// ---- lanes ------------------------------------------------------------------------------------

template <int step, class V, int... i>
AIGC_INLINE V add_halves(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (i & step ? n + i : i)...) +
         __builtin_shufflevector(a, b, (i & step ? n + (i ^ step) : i ^ step)...);
}

// Lane i of the result is the sum of the lanes of v[i].
template <class A, int step = kLanes<A> / 2>
AIGC_INLINE Vec<A> sum_each(Vec<A>* v) {
  if constexpr (step == 0) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i)
      v[i] = add_halves<step>(v[i], v[i + step], std::make_integer_sequence<int, kLanes<A>>{});
    return sum_each<A, step / 2>(v);
  }
}

template <int step, class V, int... i>
AIGC_INLINE V swap_lanes(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ step)...);
}

// Combines the lanes that hold the same row: lane % R.
template <class A, int R, int step = kLanes<A> / 2, class F>
AIGC_INLINE Vec<A> over_keys(Vec<A> v, F f) {
  if constexpr (step < R) {
    return v;
  } else {
    v = f(v, swap_lanes<step>(v, std::make_integer_sequence<int, kLanes<A>>{}));
    return over_keys<A, R, step / 2>(v, f);
  }
}

// e^x for x <= 0; 0 below -87, where the true value is no normal number any more.
template <class A>
AIGC_INLINE Vec<A> exp_of_negative(Vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    return exp<double>(x);
  } else {
    typedef Vec<int32_t> I;
    const Vec<float> shifted = x * 1.44269504089f + 12582912.0f;
    const Vec<float> n = shifted - 12582912.0f;
    Vec<float> r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    const Vec<float> y = exp_tail(r) + r + 1.0f;
    const I power = (reinterpret_cast<I>(shifted) << 23) + 0x3f800000;  // 2^n
    return x < -87.0f ? Vec<float>{} : y * reinterpret_cast<Vec<float>>(power);
  }
}

// ---- one unit ---------------------------------------------------------------------------------

template <class T>
struct Rows {  // a tensor (batch, seq, head, head_dim) with its last dimension contiguous
  const T* data;
  int64_t batch, seq, head;
  explicit Rows(const Tensor& x)
      : data(aigc_fast::data<T>(x)), batch(x.stride(0)), seq(x.stride(1)), head(x.stride(2)) {}
};

struct Shape {
  int64_t batch, q_len, heads, kv_heads, head_dim, capacity;
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return q_len * group(); }
  // Keys that query `i` of a sequence sees.
  int64_t visible(int64_t length, int64_t i) const {
    return std::max<int64_t>(0, length - q_len + i + 1);
  }
};

// Row r of a key/value head is query r / group of head r % group, so that the rows of a tile see
// about as many keys.
template <class T, int R>
class Attention {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, K = L / R;  // lanes; keys of a score tile
  static_assert(L % R == 0 && kBlock % K == 0 && kRows % R == 0);

  Attention(const Shape& shape, Rows<T> query, Rows<T> keys, Rows<T> values, A scale)
      : s_(shape),
        query_(query),
        keys_(keys),
        values_(values),
        scale_(scale),
        pairs_((shape.head_dim + 2 * L - 1) / (2 * L)) {}

  // Numbers in a tile of rows: their queries [pair][2][R][L], or their results, which are the
  // weighted values in the same order, and the maximum and the sum of each row, L lanes each.
  int64_t query_size() const { return pairs_ * 2 * R * L; }
  int64_t result_size() const { return query_size() + 2 * L; }

  const T* key(int64_t b, int64_t head, int64_t index) const {
    return keys_.data + b * keys_.batch + head * keys_.head + index * keys_.seq;
  }

  // Results of the rows [first, last) of a head over the keys [begin, end). `after` is where the
  // thread will read next.
  void attend(int64_t b, int64_t head, int64_t first, int64_t last, int64_t length, int64_t begin,
              int64_t end, const T* after, A* query, A* result) const {
    for (int64_t row = first; row < last; row += R) {
      load_query(b, head, row, last, query + (row - first) / R * query_size());
      A* tile = result + (row - first) / R * result_size();
      std::fill_n(tile, result_size(), A(0));
      store(tile + query_size(), broadcast(-std::numeric_limits<A>::infinity()));
    }
    const T* values = values_.data + b * values_.batch + head * values_.head;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t stop = std::min(end, start + kBlock);
      Block block{key(b, head, start), values + start * values_.seq,
                  stop < end ? key(b, head, stop) : after, start, stop, true};
      for (int64_t row = first; row < last; row += R, block.is_new = false) {
        const int64_t tile = (row - first) / R;
        add_block(block, row, std::min(last, row + R), length, query + tile * query_size(),
                  result + tile * result_size());
      }
    }
  }

  // Merges `count` results of a tile, `stride` apart, and writes the rows [row, last).
  void merge(const A* results, int64_t count, int64_t stride, int64_t b, int64_t head, int64_t row,
             int64_t last, T* out, A* lse) const {
    const A* maxima = results + query_size();
    V top = load(maxima);
    for (int64_t i = 1; i < count; ++i) top = max<A>(top, load(maxima + i * stride));
    const V base = finite_or_zero(top);
    std::vector<A> weights(count * L);
    V sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const V weight = exp_of_negative<A>(load(maxima + i * stride) - base);
      sum += weight * load(maxima + i * stride + L);
      store(weights.data() + i * L, weight);
    }
    A tops[L], sums[L];
    store(tops, top);
    store(sums, sum);
    for (int64_t r = row; r < last; ++r) {
      const int64_t lane = r - row;
      const int64_t at = (b * s_.q_len + r / s_.group()) * s_.heads + head * s_.group() + r % s_.group();
      const A norm = sums[lane] == 0 ? A(0) : 1 / sums[lane];
      lse[at] = tops[lane] + std::log(sums[lane]);
      for (int64_t p = 0; p < pairs_; ++p) {
        V even = {}, odd = {};
        for (int64_t i = 0; i < count; ++i) {
          const A* value = results + i * stride + (p * 2 * R + lane) * L;
          even += load(value) * weights[i * L + lane];
          odd += load(value + R * L) * weights[i * L + lane];
        }
        store_pair(out + at * s_.head_dim + p * 2 * L, even * norm, odd * norm,
                   std::min<int64_t>(2 * L, s_.head_dim - p * 2 * L));
      }
    }
  }

 private:
  struct Block {
    const T *keys, *values, *next;  // next: the keys to read after this block
    int64_t start, stop;
    bool is_new;  // not yet in the cache
  };

  static V finite_or_zero(V v) { return v == -std::numeric_limits<A>::infinity() ? V{} : v; }

  void load_query(int64_t b, int64_t head, int64_t row, int64_t last, A* tile) const {
    for (int r = 0; r < R; ++r) {
      const int64_t i = (row + r) / s_.group(), g = (row + r) % s_.group();
      for (int64_t p = 0; p < pairs_; ++p) {
        V x = {}, y = {};
        if (row + r < last)
          load_pair(query_.data + b * query_.batch + i * query_.seq +
                        (head * s_.group() + g) * query_.head + p * 2 * L,
                    std::min<int64_t>(2 * L, s_.head_dim - p * 2 * L), x, y);
        store(tile + (p * 2 * R + r) * L, x);
        store(tile + (p * 2 * R + R + r) * L, y);
      }
    }
  }

  // One block of keys for one tile of rows.
  void add_block(const Block& block, int64_t row, int64_t last, int64_t length, const A* query,
                 A* result) const {
    const int64_t fewest = s_.visible(length, row / s_.group());
    const int64_t most = s_.visible(length, (last - 1) / s_.group());
    const int64_t count = std::min(most, block.stop) - block.start;
    if (count <= 0) return;

    alignas(64) A scores[kBlock * R];
    const V lowest = broadcast(-std::numeric_limits<A>::infinity());
    V top = lowest;
    for (int64_t k = 0; k < count; k += K) {
      if (block.is_new)
        for (int i = 0; i < K; ++i) prefetch(block.values + (k + i) * values_.seq);
      const V score = dot_products(query, block.keys + k * keys_.seq, count - k) * scale_;
      store(scores + k * R, score);
      top = max<A>(top, score);
    }
    // Where rows see different numbers of keys, or a tile has no key left.
    if (const int64_t padded = (count + K - 1) / K * K; block.start + padded > fewest) {
      top = lowest;
      for (int64_t k = 0; k < padded; k += K) {
        for (int lane = 0; lane < L; ++lane) {
          const int64_t seen = s_.visible(length, std::min(row + lane % R, last - 1) / s_.group());
          if (block.start + k + lane / R >= seen) scores[k * R + lane] = lowest[0];
        }
        top = max<A>(top, load(scores + k * R));
      }
    }
    top = over_keys<A, R>(top, max<A>);
    const V before = load(result + query_size());
    const V now = max<A>(before, top), base = finite_or_zero(now);
    const V decay = exp_of_negative<A>(before - base);
    V sum = {};
    for (int64_t k = 0; k < count; k += K) {
      const V p = exp_of_negative<A>(load(scores + k * R) - base);
      store(scores + k * R, p);
      sum += p;
    }
    sum = over_keys<A, R>(sum, [](V a, V b) { return a + b; });
    store(result + query_size(), now);
    store(result + query_size() + L, load(result + query_size() + L) * decay + sum);
    A decays[L];
    store(decays, decay);

    constexpr int P = kPairs;
    const int64_t whole = s_.head_dim / (2 * L);
    int64_t p = 0;
    for (; p + P <= whole; p += P) add_values<P>(scores, block, count, p, 0, decays, result);
    for (; p < whole; ++p) add_values<1>(scores, block, count, p, 0, decays, result);
    if (p < pairs_) add_values<1>(scores, block, count, p, s_.head_dim % (2 * L), decays, result);
  }

  // Always inlined: GCC 12 drops calls of a function that does nothing else.
  AIGC_INLINE void prefetch(const T* row) const {
    const char* p = reinterpret_cast<const char*>(row);
    for (size_t i = 0; i < s_.head_dim * sizeof(T); i += 64) __builtin_prefetch(p + i, 0, 3);
  }

  // The products of K keys with the R queries of a tile: lane k * R + r. Keys past `count` are
  // replaced by the last one; their scores are masked.
  V dot_products(const A* query, const T* keys, int64_t count) const {
    const T* key[K];
    key[0] = keys;
    for (int k = 1; k < K; ++k) key[k] = key[k - 1] + (k < count ? keys_.seq : 0);
    V sums[L] = {};
    auto add = [&](const A* q, auto load) {
      V even[K], odd[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) load(key[k], even[k], odd[k]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V a = aigc_fast::load(q + r * L), b = aigc_fast::load(q + (R + r) * L);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          sums[k * R + r] += a * even[k];
          sums[k * R + r] += b * odd[k];
        }
      }
    };
    const int64_t whole = s_.head_dim / (2 * L) * (2 * L), rest = s_.head_dim - whole;
    for (int64_t d = 0; d < whole; d += 2 * L)
      add(query + d * R, [d](const T* p, V& a, V& b) { load_pair(p + d, a, b); });
    if (rest)
      add(query + whole * R, [=](const T* p, V& a, V& b) { load_pair(p + whole, rest, a, b); });
    return sum_each<A>(sums);
  }

  // Adds probabilities * values for P pairs of head_dim; `rest` elements of the last pair if not 0.
  template <int P>
  void add_values(const A* probabilities, const Block& block, int64_t count, int64_t pair,
                  int64_t rest, const A* decays, A* result) const {
    V sums[2 * P][R];
    A* out = result + pair * 2 * R * L;
#pragma GCC unroll 16
    for (int j = 0; j < 2 * P; ++j)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[j][r] = load(out + (j * R + r) * L) * decays[r];
    const T* values = block.values + pair * 2 * L;
    const bool fetch = pair == 0 && block.is_new ;
    for (int64_t k = 0; k < count; ++k, values += values_.seq) {
      if (fetch) prefetch(block.next + k * keys_.seq);
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) {
        V a, b;
        if (rest)
          load_pair(values + j * 2 * L, rest, a, b);
        else
          load_pair(values + j * 2 * L, a, b);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          sums[2 * j][r] += a * probabilities[k * R + r];
          sums[2 * j + 1][r] += b * probabilities[k * R + r];
        }
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < 2 * P; ++j)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) store(out + (j * R + r) * L, sums[j][r]);
  }

  // Pairs whose sums stay in registers: 16 of 32 in AVX-512, 8 of 16 elsewhere.
  static constexpr int kPairs = (kVectorBytes == 64 ? 8 : 4) / R;

  Shape s_;
  Rows<T> query_, keys_, values_;
  A scale_;
  int64_t pairs_;
};

// ---- all units --------------------------------------------------------------------------------

struct Unit {
  int64_t b, split, head, chunk;
};

template <class T, int R>
void run(const Shape& s, const Attention<T, R>& attention, const std::vector<int64_t>& lengths,
         T* out, Acc<T>* lse) {
  using A = Acc<T>;
  const int64_t rows = s.rows(), chunks = (rows + kRows - 1) / kRows;
  // Longer splits for more rows: their results then take less memory than the cache itself.
  const int64_t split = kSplit * std::max<int64_t>(1, rows / kRows);
  std::vector<Unit> units;
  std::vector<int64_t> first(s.batch + 1);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t splits = std::max<int64_t>(1, (lengths[b] + split - 1) / split);
    for (int64_t i = 0; i < splits; ++i)
      for (int64_t h = 0; h < s.kv_heads; ++h)
        for (int64_t c = 0; c < chunks; ++c) units.push_back({b, i, h, c});
    first[b + 1] = units.size();
  }
  const int64_t tiles = (std::min(rows, kRows) + R - 1) / R;
  const int64_t size = tiles * attention.result_size();
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  auto allocate = [](int64_t n) {
    const size_t bytes = (n * sizeof(A) + 63) / 64 * 64;
    return std::unique_ptr<A, Free>(static_cast<A*>(std::aligned_alloc(64, bytes)));
  };
  const auto results = allocate(units.size() * size);
  torch::stable::parallel_for(0, units.size(), 1, [&](int64_t begin, int64_t end) {
    const auto query = allocate(tiles * attention.query_size());
    for (int64_t u = begin; u < end; ++u) {
      const auto [b, i, h, c] = units[u];
      const Unit& next = units[std::min(u + 1, end - 1)];
      attention.attend(b, h, c * kRows, std::min(rows, (c + 1) * kRows), lengths[b], i * split,
                       std::min(lengths[b], (i + 1) * split),
                       attention.key(next.b, next.head, next.split * split), query.get(),
                       results.get() + u * size);
    }
  });
  const int64_t heads = s.kv_heads * chunks;
  torch::stable::parallel_for(0, s.batch * heads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = u / heads, h = u % heads / chunks, c = u % chunks;
      const int64_t start = c * kRows, stop = std::min(rows, start + kRows);
      const A* parts = results.get() + (first[b] + u % heads) * size;
      for (int64_t row = start; row < stop; row += R)
        attention.merge(parts + (row - start) / R * attention.result_size(),
                        (first[b + 1] - first[b]) / heads, heads * size, b, h, row,
                        std::min(stop, row + R), out, lse);
    }
  });
}

Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

std::vector<int64_t> read_lengths(const Tensor& lengths, const Shape& s) {
  const auto type = lengths.scalar_type();
  require(type == ScalarType::Int || type == ScalarType::Long,
          "cache_lengths must be int32 or int64");
  require(lengths.dim() == 1 && lengths.size(0) == s.batch, "cache_lengths must have shape (",
          s.batch, ",)");
  std::vector<int64_t> values(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t at = b * lengths.stride(0);
    values[b] = type == ScalarType::Int ? data<int32_t>(lengths)[at] : data<int64_t>(lengths)[at];
    require(values[b] >= 0 && values[b] <= s.capacity, "cache_lengths must be in [0, ", s.capacity,
            "], got ", values[b], " for sequence ", b);
  }
  return values;
}

std::tuple<Tensor, Tensor> decode_attention(const Tensor& query_in, const Tensor& key_in,
                                            const Tensor& value_in, const Tensor& lengths_in,
                                            std::optional<double> scale) {
  require(query_in.dim() == 4 && key_in.dim() == 4 && same_shape(key_in, value_in),
          "query and caches must have 4 dimensions, the caches the same shape");
  require(key_in.scalar_type() == query_in.scalar_type() &&
              value_in.scalar_type() == query_in.scalar_type(),
          "the caches must have the dtype of query");
  const Shape s{query_in.size(0), query_in.size(1), query_in.size(2),
                key_in.size(2),   query_in.size(3), key_in.size(1)};
  require(key_in.size(0) == s.batch && key_in.size(3) == s.head_dim && s.head_dim > 0,
          "the caches must have the batch and head_dim of query");
  require(s.kv_heads > 0 && s.heads % s.kv_heads == 0,
          "the heads of query must be a multiple of those of the caches");
  const std::vector<int64_t> lengths = read_lengths(lengths_in, s);
  const Tensor query = with_contiguous_rows(query_in), keys = with_contiguous_rows(key_in),
               values = with_contiguous_rows(value_in);
  const bool wide = query.scalar_type() == ScalarType::Double;
  Tensor out = empty({s.batch, s.q_len, s.heads, s.head_dim}, query.scalar_type());
  Tensor lse = empty({s.batch, s.q_len, s.heads}, wide ? ScalarType::Double : ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  dispatch(query, "query", [&]<class T>(T) {
    using A = Acc<T>;
    const A factor = scale ? *scale : 1 / std::sqrt(static_cast<double>(s.head_dim));
    auto with_tile = [&]<int R>(std::integral_constant<int, R>) {
      run<T, R>(s, {s, Rows<T>(query), Rows<T>(keys), Rows<T>(values), factor}, lengths,
                mutable_data<T>(out), mutable_data<A>(lse));
    };
    if (s.rows() == 1) return with_tile(std::integral_constant<int, 1>{});
    if (s.rows() == 2 || kLanes<A> == 2) return with_tile(std::integral_constant<int, 2>{});
    with_tile(std::integral_constant<int, std::min(4, kLanes<A>)>{});
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace
}  // namespace aigc_fast

// softmax(scale * Q K^T) V over a key/value cache.
//
// Work is cut into units of (sequence, split of the cache, key/value heads, chunk of query rows).
// The rows of a head are the query heads of its group and the new tokens, so that each element of
// the caches is read and converted once for all of them. A unit walks its keys in blocks that stay
// in the cache: scores, softmax with a running maximum, then values (attention.h). The results
// of the splits (maximum, sum, weighted values) are merged at the end. The splits of a sequence and
// the blocks in them depend on its own length and shape alone, so its bits do not depend on the
// number of threads or on other sequences, which decide how many heads a unit has.
#include <memory>

#include "attention.h"
#include "attention_bf16.h"
#include "attention_dot.h"
#include "attention_dot_int8.h"
#include "attention_int8.h"

namespace aigc_fast {
namespace {

// Keys of a unit that has up to kUnitRows rows of a head.
int64_t split_of(int64_t keys) { return std::clamp<int64_t>((keys / 4 + 63) / 64 * 64, 256, 512); }

// Most rows of the heads of a unit.
constexpr int64_t kRowsTogether = 128;

template <class T, class P, class A>
void run(const AttentionShape& s, HeadRows<T> queries, const Attention<P>& attention,
         const std::vector<int64_t>& lengths, T* out, A* lse) {
  constexpr int R = P::R;
  const int64_t rows = s.rows(), chunks = (rows + kUnitRows - 1) / kUnitRows;
  // More rows have longer splits: their results then take less memory than the cache itself.
  const int64_t longer = std::max<int64_t>(1, rows / kUnitRows);
  std::vector<int64_t> splits(s.batch);
  int64_t all_splits = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t keys = lengths[b] - s.oldest(lengths[b], 0);
    splits[b] = split_of(keys) * longer;
    all_splits += (keys + splits[b] - 1) / splits[b];
  }
  // Heads that lie side by side are walked together, so that memory is read as it lies, if that
  // leaves enough for every thread.
  const bool together = attention.side_by_side() && rows <= kUnitRows &&
                        rows * s.kv_heads <= kRowsTogether &&
                        all_splits >= 2 * torch::stable::get_num_threads();
  const int64_t heads = together ? s.kv_heads : 1;
  std::vector<AttentionUnit> units;
  std::vector<int64_t> first(s.batch + 1);
  for (int64_t b = 0; b < s.batch; ++b) {
    int64_t begin = s.oldest(lengths[b], 0);
    do {
      const int64_t end = std::min(lengths[b], begin + splits[b]);
      for (int64_t h = 0; h < s.kv_heads; h += heads)
        for (int64_t row = 0; row < rows; row += kUnitRows)
          units.push_back({b, h, heads, row, std::min(rows, row + kUnitRows), begin, end});
      begin = end;
    } while (begin < lengths[b]);
    first[b + 1] = units.size();
  }
  const int64_t tiles = (std::min(rows, kUnitRows) + R - 1) / R;
  const int64_t size = tiles * attention.result_size();
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  auto allocate = [](int64_t n) {
    const size_t bytes = (n * sizeof(A) + 63) / 64 * 64;
    auto* p = static_cast<A*>(std::aligned_alloc(64, bytes));
    if (!p) throw std::bad_alloc();
    return std::unique_ptr<A, Free>(p);
  };
  const auto results = allocate(units.size() * heads * size);
  torch::stable::parallel_for(0, units.size(), 1, [&](int64_t begin, int64_t end) {
    const int64_t query_size = tiles * attention.query_size();
    const auto query = allocate(heads * query_size);
    [[maybe_unused]] const typename P::Thread thread;
    for (int64_t u = begin; u < end; ++u) {
      const AttentionUnit& unit = units[u];
      for (int64_t h = 0; h < heads; ++h)
        attention.load_queries(queries, unit.b, unit.head + h, unit.first, unit.last,
                               query.get() + h * query_size);
      attention.attend(unit, lengths[unit.b], units[std::min(u + 1, end - 1)], query.get(),
                       results.get() + u * heads * size);
    }
  });
  const int64_t parts = s.kv_heads * chunks;
  torch::stable::parallel_for(0, s.batch * parts, 16, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = u / parts, h = u % parts / chunks, c = u % chunks;
      const int64_t start = c * kUnitRows, stop = std::min(rows, start + kUnitRows);
      const A* results_of = results.get() + (first[b] * heads + u % parts) * size;
      for (int64_t row = start; row < stop; row += R)
        attention.merge(results_of + (row - start) / R * attention.result_size(),
                        (first[b + 1] - first[b]) * heads / parts, parts * size, b, h, row,
                        std::min(stop, row + R), out, lse);
    }
  });
}

std::vector<int64_t> read_lengths(const Tensor& lengths, const AttentionShape& s) {
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

std::tuple<Tensor, Tensor> decode_attention_full(
    const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& lengths_in,
    std::optional<double> scale, std::optional<int64_t> window, std::optional<double> softcap,
    const MaybeTensor& table, const MaybeTensor& sinks_in, const MaybeTensor& slopes_in,
    const MaybeTensor& key_scale_in, const MaybeTensor& value_scale_in,
    std::optional<int64_t> fixed_split, const MaybeTensor& mask_in) {
  require(query_in.dim() == 4 && key_in.dim() == 4 && same_shape(key_in, value_in),
          "query and caches must have 4 dimensions, the caches the same shape");
  require(key_in.scalar_type() == value_in.scalar_type(), "the caches must have the same dtype");
  AttentionShape s{query_in.size(0), query_in.size(1), query_in.size(2),
                   key_in.size(2),   query_in.size(3), key_in.size(1)};
  Pages pages;
  if (table) {
    pages = {*table, key_in, s.batch};
    s.capacity = table->size(1) * pages.size;
  }
  require((table || key_in.size(0) == s.batch) && key_in.size(3) == s.head_dim && s.head_dim > 0,
          "the caches must have the batch and head_dim of query");
  require(s.kv_heads > 0 && s.heads % s.kv_heads == 0,
          "the heads of query must be a multiple of those of the caches");
  require(!window || *window > 0, "window must be at least 1");
  if (window) s.window = std::min(s.window, *window);
  require(!fixed_split || *fixed_split > 0, "fixed_split must be at least 1");
  require(!softcap || *softcap > 0, "softcap must be positive");
  const std::vector<int64_t> lengths = read_lengths(lengths_in, s);
  for (int64_t b = 0; table && b < s.batch; ++b)
    pages.check(b, s.oldest(lengths[b], 0), lengths[b], key_in.size(0));
  s.masked = mask_in.has_value();
  const Tensor mask = s.masked ? as_contiguous(*mask_in) : query_in;
  if (s.masked) {
    const int64_t dims = mask.dim();
    require(mask.scalar_type() == ScalarType::Bool && (dims == 2 || dims == 3) &&
                (dims == 2 || mask.size(0) == s.batch) && mask.size(dims - 2) == s.q_len &&
                mask.size(dims - 1) == s.q_len,
            "mask must be bool and have shape (q_len, q_len) or (batch, q_len, q_len)");
  }
  const Tensor query = with_dense_rows(query_in), keys = with_dense_rows(key_in),
               values = with_dense_rows(value_in);
  Tensor out = empty({s.batch, s.q_len, s.heads, s.head_dim}, query.scalar_type());
  Tensor lse = empty({s.batch, s.q_len, s.heads}, acc_dtype(query));
  dispatch(query, "query", [&]<class T>(T) {
    using A = Acc<T>;
    const A factor = scale ? *scale : 1 / std::sqrt(static_cast<double>(s.head_dim));
    const auto slopes = of_heads<A>(slopes_in, "alibi_slopes", s.heads);
    const auto sinks = of_heads<A>(sinks_in, "sinks", s.heads);
    const auto key_scale = of_heads<A>(key_scale_in, "key_scale", s.kv_heads);
    const auto value_scale = of_heads<A>(value_scale_in, "value_scale", s.kv_heads);
    const auto given = [](const std::vector<A>& x) { return x.empty() ? nullptr : x.data(); };
    const ScoreOptions<A> options{softcap ? static_cast<A>(*softcap) : A(0),
                                  given(slopes),
                                  given(key_scale),
                                  given(value_scale),
                                  s.masked ? data<bool>(mask) : nullptr,
                                  s.masked && mask.dim() == 3 ? s.q_len * s.q_len : 0,
                                  given(sinks)};
    dispatch_cache_of<T>(keys, [&]<class C>(C) {
      if (lse.numel() == 0) return;
      auto with = [&]<class P>(std::type_identity<P>) {
        const Attention<P> attention(s, HeadRows<C>(keys), HeadRows<C>(values), factor, pages,
                                     options);
        run(s, HeadRows<T>(query), attention, lengths, mutable_data<T>(out), mutable_data<A>(lse));
      };
#if AIGC_AMX
      if constexpr (std::is_same_v<A, float> && std::is_same_v<C, int8_t>)
        if (Int8Products::fits(s.rows(), s.head_dim))
          return with(std::type_identity<Int8Products>{});
      if constexpr (std::is_same_v<T, bf16> && std::is_same_v<C, bf16>)
        if (Bf16Products::fits(s.head_dim)) return with(std::type_identity<Bf16Products>{});
#endif
      const auto of_rows = [&]<int R>(std::integral_constant<int, R>) {
#if AIGC_BF16_DOT
        if constexpr (std::is_same_v<T, bf16> && std::is_same_v<C, bf16>)
          if (has_bf16_dot()) return with(std::type_identity<Bf16DotProducts<R>>{});
#endif
#if AIGC_INT8_DOT
        if constexpr (sizeof(T) == 2 && std::is_same_v<C, int8_t>)
          if (Int8DotProducts<R>::fits(s.head_dim))
            return with(std::type_identity<Int8DotProducts<R>>{});
#endif
        with(std::type_identity<Products<A, C, R>>{});
      };
      if (s.rows() == 1) return of_rows(std::integral_constant<int, 1>{});
      if (s.rows() == 2 || kLanes<A> == 2) return of_rows(std::integral_constant<int, 2>{});
      of_rows(std::integral_constant<int, std::min(4, kLanes<A>)>{});
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& keys,
                                            const Tensor& values, const Tensor& lengths,
                                            std::optional<double> scale) {
  return decode_attention_full(query, keys, values, lengths, scale, {}, {}, {}, {}, {}, {}, {}, {},
                               {});
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("decode_attention_full", TORCH_BOX(&decode_attention_full));
}

}  // namespace
}  // namespace aigc_fast

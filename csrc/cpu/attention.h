// Attention of a few query rows to a few keys: one unit of work of decode_attention.cpp and of
// decoder_step.h.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_products.h"
#include "attention_shape.h"

namespace aigc_fast {

constexpr int64_t kUnitRows = 32;  // most rows of a unit

// A part of the work: the rows [first, last) of each of `heads` heads of sequence b from `head` on,
// over the keys [begin, end).
struct AttentionUnit {
  int64_t b, head, heads, first, last, begin, end;
};

// Row r of a key/value head is query r / group of head r % group, so that the rows of a tile see
// about as many keys. P are the products: C is the type of the caches, A that of the arithmetic;
// queries and outputs may have another type T, which is all that their methods are instantiated
// for.
template <class P>
class Attention {
 public:
  using A = typename P::A;
  using C = typename P::C;
  using V = Vec<A>;
  static constexpr int R = P::R, L = P::L, K = P::K;  // rows; lanes; keys of a vector of scores
  static constexpr int64_t kBlock = P::kBlock;        // most keys between two looks at the maximum
  static constexpr int64_t kStep = 8;                 // addresses that are computed at a time
  static_assert(kUnitRows % R == 0);

  Attention(const AttentionShape& shape, HeadRows<C> keys, HeadRows<C> values, A scale,
            const Pages& pages = {}, const ScoreOptions<A>& options = {})
      : s_(shape),
        keys_(keys),
        values_(values),
        scale_(scale),
        pages_(pages),
        options_(options),
        products_{shape.head_dim},
        pairs_((shape.head_dim + 2 * L - 1) / (2 * L)),
        block_(shape.kv_heads * shape.head_dim * sizeof(C) > 512 ? P::kShortBlock : kBlock) {}

  // Numbers in a tile of rows: their queries, or their results, which are the weighted values
  // [pair][2][R][L], and the maximum and the sum of each row, L lanes each.
  int64_t query_size() const { return products_.query_size(); }
  int64_t values_size() const { return pairs_ * 2 * R * L; }
  int64_t result_size() const { return values_size() + 2 * L; }

  // Whether the heads of a token lie side by side.
  bool side_by_side() const { return keys_.head < keys_.seq && values_.head < values_.seq; }

  // The queries of the rows [first, last) of a head.
  template <class T>
  void load_queries(HeadRows<T> query, int64_t b, int64_t head, int64_t first, int64_t last,
                    A* tiles) const {
    for (int64_t row = first; row < last; row += R, tiles += query_size()) {
      for (int r = 0; r < R; ++r) {
        const int64_t i = (row + r) / s_.group(), g = (row + r) % s_.group();
        const T* from =
            query.data + b * query.batch + i * query.seq + (head * s_.group() + g) * query.head;
        for (int64_t p = 0; p < pairs_; ++p) {
          V x = {}, y = {};
          if (row + r < last)
            load_pair(from + p * 2 * L, std::min<int64_t>(2 * L, s_.head_dim - p * 2 * L), x, y);
          if constexpr (!std::is_same_v<T, C>) pair_to_halves<T>(x, y);
          store(tiles + (p * 2 * R + r) * L, x);
          store(tiles + (p * 2 * R + R + r) * L, y);
        }
      }
      products_.prepare(tiles);
    }
  }

  // The results of a unit, [head][tile]. `after` is where the thread will read next.
  void attend(const AttentionUnit& unit, int64_t length, const AttentionUnit& after, const A* query,
              A* result) const {
    const auto [b, head, heads, first, last, unit_begin, unit_end] = unit;
    const int64_t tiles = (last - first + R - 1) / R;
    for (int64_t i = 0; i < heads * tiles; ++i) {
      A* tile = result + i * result_size();
      std::fill_n(tile, result_size(), A(0));
      store(tile + values_size(), broadcast(-std::numeric_limits<A>::infinity()));
    }
    const int64_t begin = std::max(unit_begin, s_.oldest(length, first / s_.group()));
    const int64_t end = std::min(unit_end, s_.visible(length, (last - 1) / s_.group()));
    if (begin >= end) return;
    Block block, ahead;  // of the first head
    // Of one head `ahead` has the rows in order.
    const int64_t size = heads > 1 ? heads * kBlock + kStep : 0;
    std::vector<const C*> rows(2 * size);
    const C** next_keys = size ? rows.data() : ahead.keys;
    const C** next_values = size ? rows.data() + size : ahead.values;
    locate(b, head, begin, end, ahead);
    for (int64_t start = begin; start < end; start += block_) {
      block = ahead;
      if (start + block_ < end)
        locate(b, head, start + block_, end, ahead);
      else if (after.begin < after.end)
        locate(after.b, after.head, after.begin, after.end, ahead);
      if (heads > 1) {
        all_rows(ahead.keys, keys_.head, heads, next_keys);
        all_rows(ahead.values, values_.head, heads, next_values);
      }
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t row = first; row < last; row += R) {
          const int64_t tile = h * tiles + (row - first) / R;
          const bool fetch = row == first;
          add_block(block, fetch ? next_keys + h * block_ : nullptr,
                    fetch ? next_values + h * block_ : nullptr, b, head + h, row,
                    std::min(last, row + R), length, query + tile * query_size(),
                    result + tile * result_size());
        }
        for (int64_t k = 0; k < kBlock; ++k) block.keys[k] += keys_.head;
        for (int64_t k = 0; k < kBlock; ++k) block.values[k] += values_.head;
      }
    }
  }

  // Merges `count` results of a tile, `stride` apart, and writes the rows [row, last).
  template <class T>
  void merge(const A* results, int64_t count, int64_t stride, int64_t b, int64_t head, int64_t row,
             int64_t last, T* out, A* lse) const {
    const A* maxima = results + values_size();
    V top = load(maxima);
    for (int64_t i = 1; i < count; ++i) top = max<A>(top, load(maxima + i * stride));
    const V sink = options_.sinks ? of_rows(options_.sinks, head, row) : V{};
    if (options_.sinks) top = max<A>(top, sink);
    const V base = finite_or_zero(top);
    std::vector<A> weights(count * L);
    V sum = options_.sinks ? exp_of_negative<A>(sink - base) : V{};
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
      const int64_t at =
          (b * s_.q_len + r / s_.group()) * s_.heads + head * s_.group() + r % s_.group();
      const A scale = kCacheUnit<C> * (options_.value_scale ? options_.value_scale[head] : A(1));
      const A norm = sums[lane] == 0 ? A(0) : scale / sums[lane];
      lse[at] = tops[lane] + std::log(sums[lane]);
      for (int64_t p = 0; p < pairs_; ++p) {
        V even = {}, odd = {};
        for (int64_t i = 0; i < count; ++i) {
          const A* value = results + i * stride + (p * 2 * R + lane) * L;
          even += load(value) * weights[i * L + lane];
          odd += load(value + R * L) * weights[i * L + lane];
        }
        if constexpr (!std::is_same_v<T, C>) halves_to_pair<T>(even, odd);
        store_pair(out + at * s_.head_dim + p * 2 * L, even * norm, odd * norm,
                   std::min<int64_t>(2 * L, s_.head_dim - p * 2 * L));
      }
    }
  }

 private:
  struct Block {  // up to kBlock keys; the addresses behind the last one are its own
    const C *keys[kBlock], *values[kBlock];
    int64_t start, stop;
  };

  // The rows of `heads` heads of the tokens of a block, a token's side by side as they lie in
  // memory. Writes up to kStep - 1 more.
  void all_rows(const C* const* first, int64_t stride, int64_t heads, const C** rows) const {
    int64_t steps[kStep];
    for (int64_t i = 0; i < kStep; ++i) steps[i] = i * stride;
    for (int64_t k = 0; k < block_; ++k)
      for (int64_t h = 0; h < heads; h += kStep)
        for (int64_t i = 0; i < kStep; ++i)
          rows[k * heads + h + i] = first[k] + h * stride + steps[i];
  }

  static V finite_or_zero(V v) { return v == -std::numeric_limits<A>::infinity() ? V{} : v; }

  // The keys from `start` on.
  void locate(int64_t b, int64_t head, int64_t start, int64_t end, Block& block) const {
    block.start = start;
    block.stop = std::min(end, start + block_);
    const C* keys = keys_.data + head * keys_.head;
    const C* values = values_.data + head * values_.head;
    const int64_t last = block.stop - start - 1;
    if (!pages_.table) {
      keys += b * keys_.batch + start * keys_.seq;
      values += b * values_.batch + start * values_.seq;
      for (int64_t k = 0; k < kBlock; ++k) {
        const int64_t i = std::min(k, last);
        block.keys[k] = keys + i * keys_.seq;
        block.values[k] = values + i * values_.seq;
      }
      return;
    }
    int64_t page = start / pages_.size, slot = start % pages_.size;
    for (int64_t k = 0; k < kBlock; ++k) {
      const int64_t id = pages_.at(b, page);
      block.keys[k] = keys + id * keys_.batch + slot * keys_.seq;
      block.values[k] = values + id * values_.batch + slot * values_.seq;
      if (k < last && ++slot == pages_.size) ++page, slot = 0;
    }
  }

  // The numbers of a tile's heads: lane k * R + r.
  V of_rows(const A* of_heads, int64_t head, int64_t row) const {
    V v;
    for (int lane = 0; lane < L; ++lane)
      v[lane] = of_heads[head * s_.group() + (row + lane % R) % s_.group()];
    return v;
  }

  // One block of keys for one tile of rows. Fetches as many rows that come next into the cache,
  // unless they are null.
  void add_block(const Block& block, const C* const* next_keys, const C* const* next_values,
                 int64_t b, int64_t head, int64_t row, int64_t last, int64_t length, const A* query,
                 A* result) const {
    const int64_t fewest = s_.certain(length, row / s_.group());
    const int64_t most = s_.visible(length, (last - 1) / s_.group());
    const int64_t count = std::min(most, block.stop) - block.start;
    if (count <= 0 || block.stop <= s_.oldest(length, row / s_.group())) return;

    alignas(64) A scores[kBlock * R];
    const V lowest = broadcast(-std::numeric_limits<A>::infinity());
    V top = lowest;
    const A scale = scale_ * kCacheUnit<C> * (options_.key_scale ? options_.key_scale[head] : 1);
    products_.scores(query, block.keys, count, next_keys, scores);
    for (int64_t k = 0; k < count; k += K) {
      const V score = load(scores + k * R) * scale;
      store(scores + k * R, score);
      top = max<A>(top, score);
    }
    const int64_t padded = (count + K - 1) / K * K;
    if (options_.softcap || options_.slopes)
      top = adjust(block.start, padded, head, row, length, scores);
    // Where rows see different keys, or a vector or a tile has no key left.
    if (padded > count || block.start + padded > fewest ||
        block.start < s_.oldest(length, (last - 1) / s_.group())) {
      top = lowest;
      for (int64_t k = 0; k < padded; k += K) {
        for (int lane = 0; lane < L; ++lane) {
          const int64_t i = std::min(row + lane % R, last - 1) / s_.group();
          const int64_t at = block.start + k + lane / R;
          if (k + lane / R >= count || at < s_.oldest(length, i) || !sees(b, i, at, length))
            scores[k * R + lane] = lowest[0];
        }
        top = max<A>(top, load(scores + k * R));
      }
    }
    top = over_keys<A, R>(top, max<A>);
    const V before = load(result + values_size());
    const V now = max<A>(before, top), base = finite_or_zero(now);
    const V decay = exp_of_negative<A>(before - base);
    V sum = {};
    for (int64_t k = 0; k < count; k += K) {
      const V p = exp_of_negative<A>(load(scores + k * R) - base);
      store(scores + k * R, p);
      sum += p;
    }
    sum = over_keys<A, R>(sum, [](V a, V b) { return a + b; });
    store(result + values_size(), now);
    store(result + values_size() + L, load(result + values_size() + L) * decay + sum);
    A decays[L];
    store(decays, decay);
    products_.add_values(scores, block.values, count, decays, result, next_values);
  }

  // Of the keys that are not too old: whether query i sees the one at `at`.
  bool sees(int64_t b, int64_t i, int64_t at, int64_t length) const {
    if (at >= s_.visible(length, i)) return false;
    const int64_t newest = at - (length - s_.q_len);
    return !s_.masked || newest < 0 ||
           options_.mask[b * options_.mask_batch + i * s_.q_len + newest];
  }

  // Softcap and ALiBi for the scores of `count` keys from `start`; returns their maxima.
  V adjust(int64_t start, int64_t count, int64_t head, int64_t row, int64_t length,
           A* scores) const {
    V slopes = {}, distance = {};  // of a key from its query, not positive
    if (options_.slopes) {
      slopes = of_rows(options_.slopes, head, row);
      for (int lane = 0; lane < L; ++lane)
        distance[lane] = start + lane / R - (length - s_.q_len + (row + lane % R) / s_.group());
    }
    V top = broadcast(-std::numeric_limits<A>::infinity());
    for (int64_t k = 0; k < count; k += K) {
      V score = load(scores + k * R);
      if (options_.softcap) score = options_.softcap * tanh<A>(score / options_.softcap);
      score += slopes * (distance + static_cast<A>(k));
      store(scores + k * R, score);
      top = max<A>(top, score);
    }
    return top;
  }

  AttentionShape s_;
  HeadRows<C> keys_, values_;
  A scale_;
  Pages pages_;
  ScoreOptions<A> options_;
  P products_;
  int64_t pairs_;
  // Keys between two looks at the maximum: fewer where a token has long rows, for what is fetched
  // to be in the L1 cache still when its turn comes. Never what depends on the number of threads.
  int64_t block_;
};

}  // namespace aigc_fast

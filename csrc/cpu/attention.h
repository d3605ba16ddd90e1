// Attention of a few query rows to a few keys: one unit of work of decode_attention.cpp and of
// decoder_step.h.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "attention_products.h"
#include "attention_shape.h"
#include "kept_buffer.h"

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
  static constexpr int64_t kBlock = kMostKeys;        // keys between two looks at the maximum
  // Of a group of tokens memory is read head by head; from group to group in the order in which it
  // lies. Larger ones leave the L1 cache before their turn, smaller ones cost more additions.
  static constexpr int64_t kGroupBytes = 32768;
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
        group_(std::clamp<int64_t>(std::bit_floor<uint64_t>(kGroupBytes / token_bytes()),
                                   P::kFewestKeys, kBlock)) {}

  // Of the keys of a token, all heads.
  int64_t token_bytes() const { return s_.kv_heads * s_.head_dim * sizeof(C); }

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
    const int64_t groups = kBlock / group_;
    // One head's rows are asked for when their counterparts of the block before are read; those of
    // several heads, which lie side by side, two groups before they are read.
    const int64_t ahead = heads > 1 ? 2 : 2 * groups;
    const C *addresses[2][2 * kBlock], **now = addresses[0], **next = addresses[1];
    const int64_t softmax_size = kBlock * R + L;
    KeptBuffer<A> softmax(heads * tiles * softmax_size);  // of each tile: its scores, its decays
    A ones[L];
    store(ones, broadcast(A(1)));
    locate(b, head, begin, end, now);
    for (int64_t start = begin; start < end; start += kBlock, std::swap(now, next)) {
      const int64_t stop = std::min(end, start + kBlock);
      const bool more = stop < end || after.begin < after.end;
      if (stop < end)
        locate(b, head, stop, end, next);
      else if (more)
        locate(after.b, after.head, after.begin, after.end, next);
      int64_t counts[kUnitRows];  // keys that each tile of a head sees
      for (int64_t t = 0; t < tiles; ++t)
        counts[t] = seen(start, stop, first + t * R, std::min(last, first + (t + 1) * R), length);
      // Calls f(tile, key, rows, count, fetch) for the rows of group `at`, of the keys first, then
      // of the values, and each tile that sees any.
      const auto read = [&](int64_t at, auto&& f) {
        const auto step = [&](int64_t group) { return (group < groups ? keys_ : values_).head; };
        const int64_t key = at % groups * group_, to = (at + ahead) % (2 * groups);
        const bool here = at + ahead < 2 * groups, fetches = here || more;
        const C* const* from = now + at * group_;
        const C* const* then = (here ? now : next) + to * group_;
        const C *rows[kBlock], *fetch[kBlock];
        for (int64_t h = 0, i = 0; h < heads; ++h) {
          for (int64_t k = 0; k < group_; ++k) rows[k] = from[k] + h * step(at);
          for (int64_t k = 0; fetches && k < group_; ++k) {
            fetch[k] = *then + i * step(to);  // in the order in which they lie
            if (++i == heads) i = 0, ++then;
          }
          for (int64_t t = 0; t < tiles; ++t)
            if (key < counts[t])
              f(h * tiles + t, key, rows, std::min(group_, counts[t] - key),
                fetches && t == 0 ? fetch : nullptr);
        }
      };
      for (int64_t g = 0; g < groups; ++g)
        read(g, [&](int64_t tile, int64_t key, const C* const* rows, int64_t count,
                    const C* const* fetch) {
          products_.scores(query + tile * query_size(), rows, count, fetch,
                           softmax.data() + tile * softmax_size + key * R);
        });
      for (int64_t g = groups; g < 2 * groups; ++g)
        read(g, [&](int64_t tile, int64_t key, const C* const* rows, int64_t count,
                    const C* const* fetch) {
          A *scores = softmax.data() + tile * softmax_size, *decays = scores + kBlock * R;
          A* out = result + tile * result_size();
          const int64_t t = tile % tiles, row = first + t * R;
          // One tile's at a time, so that memory is always asked for something.
          if (key == 0)
            weigh(start, counts[t], b, head + tile / tiles, row, std::min(last, row + R), length,
                  scores, decays, out + values_size());
          products_.add_values(scores + key * R, rows, count, key ? ones : decays, out, fetch);
        });
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
  static V finite_or_zero(V v) { return v == -std::numeric_limits<A>::infinity() ? V{} : v; }

  // The addresses of the first head's rows in the block from key `start` on, of the keys, then of
  // the values; those behind the last key are its own.
  void locate(int64_t b, int64_t head, int64_t start, int64_t end, const C** rows) const {
    const int64_t last = std::min(end - start, kBlock) - 1;
    int64_t row = b, i = start, page = 0;
    if (pages_.table) page = start / pages_.size, i = start % pages_.size, row = pages_.at(b, page);
    for (int64_t k = 0; k < kBlock; ++k) {
      rows[k] = keys_.data + row * keys_.batch + i * keys_.seq + head * keys_.head;
      rows[kBlock + k] = values_.data + row * values_.batch + i * values_.seq + head * values_.head;
      if (k < last && ++i == pages_.size && pages_.table) i = 0, row = pages_.at(b, ++page);
    }
  }

  // How many keys of the block [start, stop) the rows [row, last) see at most, from its first one.
  int64_t seen(int64_t start, int64_t stop, int64_t row, int64_t last, int64_t length) const {
    if (stop <= s_.oldest(length, row / s_.group())) return 0;
    return std::min(stop, s_.visible(length, (last - 1) / s_.group())) - start;
  }

  // The numbers of a tile's heads: lane k * R + r.
  V of_rows(const A* of_heads, int64_t head, int64_t row) const {
    V v;
    for (int lane = 0; lane < L; ++lane)
      v[lane] = of_heads[head * s_.group() + (row + lane % R) % s_.group()];
    return v;
  }

  // The products of `count` keys from `start` on and the rows of a tile become probabilities,
  // beside the largest score so far; `state` is that and their sum, `decays` what the sums before
  // are to be multiplied by.
  void weigh(int64_t start, int64_t count, int64_t b, int64_t head, int64_t row, int64_t last,
             int64_t length, A* scores, A* decays, A* state) const {
    const int64_t fewest = s_.certain(length, row / s_.group());
    const V lowest = broadcast(-std::numeric_limits<A>::infinity());
    V top = lowest;
    const A scale = scale_ * kCacheUnit<C> * (options_.key_scale ? options_.key_scale[head] : 1);
    for (int64_t k = 0; k < count; k += K) {
      const V score = load(scores + k * R) * scale;
      store(scores + k * R, score);
      top = max<A>(top, score);
    }
    const int64_t padded = (count + K - 1) / K * K;
    if (options_.softcap || options_.slopes) top = adjust(start, padded, head, row, length, scores);
    // Where rows see different keys, or a vector or a tile has no key left.
    if (padded > count || start + padded > fewest ||
        start < s_.oldest(length, (last - 1) / s_.group())) {
      top = lowest;
      for (int64_t k = 0; k < padded; k += K) {
        for (int lane = 0; lane < L; ++lane) {
          const int64_t i = std::min(row + lane % R, last - 1) / s_.group();
          const int64_t at = start + k + lane / R;
          if (k + lane / R >= count || at < s_.oldest(length, i) || !sees(b, i, at, length))
            scores[k * R + lane] = lowest[0];
        }
        top = max<A>(top, load(scores + k * R));
      }
    }
    top = over_keys<A, R>(top, max<A>);
    const V before = load(state);
    const V now = max<A>(before, top), base = finite_or_zero(now);
    const V decay = exp_of_negative<A>(before - base);
    V sum = {};
    for (int64_t k = 0; k < count; k += K) {
      const V p = exp_of_negative<A>(load(scores + k * R) - base);
      store(scores + k * R, p);
      sum += p;
    }
    sum = over_keys<A, R>(sum, [](V a, V b) { return a + b; });
    store(state, now);
    store(state + L, load(state + L) * decay + sum);
    store(decays, decay);
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
  // Keys of a block that are read together, of all heads: never what depends on the number of
  // threads.
  int64_t group_;
};

}  // namespace aigc_fast

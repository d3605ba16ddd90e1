// Attention of the new tokens of decoder_step in one layer: a head of query or key as attention
// takes it, the new entries of the caches, the shares of the keys, and their merging.
#pragma once

#include "attention.h"
#include "attention_int8.h"
#include "decoder_layers.h"

namespace aigc_fast {

// What all threads share. P are the products of attention. Query and what attention gives have the
// type of the caches too, but not where it has one byte: they need no room.
template <class P>
struct DecoderTokens {
  using T = typename P::C;
  using Q = std::conditional_t<sizeof(T) == 1, float, T>;

  const DecoderSizes& s;
  const DecoderNumbers& numbers;
  std::vector<int64_t> positions;
  std::vector<float> packed;   // query, key and value of each sequence
  std::vector<Q> attended;     // (batch, heads, head_dim)
  std::vector<float> results;  // of the shares of a layer, where a head has several

  DecoderTokens(const DecoderSizes& s, const DecoderNumbers& numbers,
                std::vector<int64_t> positions)
      : s(s),
        numbers(numbers),
        positions(std::move(positions)),
        packed(s.batch * s.packed()),
        attended(s.batch * s.heads * s.head_dim) {}
};

// What one thread needs beside that, and does.
template <class P>
class DecoderAttention {
  using T = typename P::C;
  using Q = typename DecoderTokens<P>::Q;
  using Heads = Attention<P>;
  static constexpr int R = P::R;
  static constexpr int64_t kLine = 16;  // floats of a cache line, to which buffers are aligned

 public:
  explicit DecoderAttention(DecoderTokens<P>& tokens)
      : tokens_(tokens),
        s_(tokens.s),
        normed_(s_.head_dim),
        heads_(s_.group() * s_.head_dim),
        query_(tiles(s_) * any(tokens).query_size() + kLine),
        result_(result_size(tokens) + kLine),
        lse_(s_.group()) {}

  // Numbers of a share's result.
  static int64_t result_size(const DecoderTokens<P>& tokens) {
    return tiles(tokens.s) * any(tokens).result_size();
  }

  // The new entry of a head.
  void append(const DecoderLayer<T>& layer, int64_t b, int64_t head) {
    const int64_t dim = s_.head_dim, at = new_entry(b, head);
    turn(layer, b, s_.heads + head, 1 / layer.key_scale[head], layer.keys + at);
    const float* value = packed(b) + (s_.heads + s_.kv_heads + head) * dim;
    const float factor = 1 / layer.value_scale[head];
    for_vectors<float>(dim, [&](int64_t i, auto n) {
      store_cached(layer.values + at + i, load(value + i, n) * factor, n);
    });
  }

  // Share `u` of the keys; whoever has the newest of them appends it before, if asked to.
  void attend(const DecoderLayer<T>& layer, int64_t u, bool appends) {
    const auto [b, head, begin, end, splits] = layer.shares->units[u];
    const int64_t length = tokens_.positions[b] + 1, dim = s_.head_dim;
    for (int64_t r = 0; r < s_.group(); ++r)
      turn(layer, b, head * s_.group() + r, 1, heads_.data() + r * dim);
    if (appends && end == length) append(layer, b, head);
    const Heads attention = of_head(layer, b, head);
    const HeadRows<Q> query(heads_.data(), 0, 0, dim);
    attention.load_queries(query, 0, 0, 0, s_.group(), aligned(query_));
    float* result =
        splits == 1 ? aligned(result_) : tokens_.results.data() + u * result_size(tokens_);
    const AttentionUnit part{0, 0, 1, 0, s_.group(), begin, end};
    attention.attend(part, length, part, aligned(query_), result);
    if (splits == 1) write(attention, b, head, result, 1);
  }

  // The results of a head with several shares.
  void merge(const DecoderLayer<T>& layer, int64_t b, int64_t head) {
    const std::vector<KeyShare>& units = layer.shares->units;
    const auto unit = std::find_if(units.begin(), units.end(),
                                   [&](const KeyShare& u) { return u.b == b && u.head == head; });
    if (unit->splits == 1) return;
    const float* results = tokens_.results.data() + (unit - units.begin()) * result_size(tokens_);
    write(of_head(layer, b, head), b, head, results, unit->splits);
  }

 private:
  static int64_t tiles(const DecoderSizes& s) { return (s.group() + R - 1) / R; }

  static AttentionShape shape(const DecoderSizes& s, int64_t window) {
    return {1, 1, s.group(), 1, s.head_dim, s.capacity, window};
  }
  // Of no head, to ask for sizes.
  static Heads any(const DecoderTokens<P>& tokens) {
    return {shape(tokens.s, 1), {nullptr, 0, 0, 0}, {nullptr, 0, 0, 0}, 1};
  }
  Heads of_head(const DecoderLayer<T>& layer, int64_t b, int64_t head) const {
    const int64_t at = (s_.pages.table ? 0 : b * s_.key_batch) + head * s_.key_head;
    return {shape(s_, layer.shares->window),
            {layer.keys + at, s_.key_batch, s_.key_seq, 0},
            {layer.values + at, s_.key_batch, s_.key_seq, 0},
            tokens_.numbers.scale,
            s_.pages.of(b),
            {.softcap = tokens_.numbers.softcap,
             .key_scale = layer.key_scale + head,
             .value_scale = layer.value_scale + head}};
  }

  const float* packed(int64_t b) const { return tokens_.packed.data() + b * s_.packed(); }
  int64_t new_entry(int64_t b, int64_t head) const {
    return s_.entry(b, tokens_.positions[b]) + head * s_.key_head;
  }

  // A head of query or, from s.heads on, of key: normalised, turned, multiplied by `factor`.
  template <class X>
  void turn(const DecoderLayer<T>& layer, int64_t b, int64_t head, float factor, X* out) {
    const float* x = packed(b) + head * s_.head_dim;
    if (const float* norm = head < s_.heads ? layer.query_norm : layer.key_norm)
      x = normalize(b, head, norm);
    int64_t half = 0;
    if (layer.cos) {
      half = s_.turning / 2;
      const int64_t at = tokens_.positions[b] * half;
      for_vectors<float>(half, [&](int64_t i, auto n) {
        const Vec<float> a = load(x + i, n), c = load(x + half + i, n);
        const Vec<float> cos = load(layer.cos + at + i, n), sin = load(layer.sin + at + i, n);
        store_cached(out + i, (a * cos - c * sin) * factor, n);
        store_cached(out + half + i, (c * cos + a * sin) * factor, n);
      });
    }
    for_vectors<float>(s_.head_dim - 2 * half, [&](int64_t i, auto n) {
      store_cached(out + 2 * half + i, load(x + 2 * half + i, n) * factor, n);
    });
  }

  const float* normalize(int64_t b, int64_t head, const float* weight) {
    const bool joint = tokens_.numbers.joint_norms, query = head < s_.heads;
    const int64_t dim = s_.head_dim;
    const int64_t first = joint ? (query ? 0 : s_.heads) : head;
    const int64_t heads = joint ? (query ? s_.heads : s_.kv_heads) : 1;
    const float factor = rms_factor(packed(b) + first * dim, heads * dim, tokens_.numbers.eps);
    scale_row(packed(b) + head * dim, dim, factor, weight + (head - first) * dim, normed_.data());
    return normed_.data();
  }

  void write(const Heads& attention, int64_t b, int64_t head, const float* results,
             int64_t splits) {
    Q* out = tokens_.attended.data() + (b * s_.heads + head * s_.group()) * s_.head_dim;
    for (int64_t tile = 0; tile < tiles(s_); ++tile)
      attention.merge(results + tile * attention.result_size(), splits, result_size(tokens_), 0, 0,
                      tile * R, std::min(s_.group(), (tile + 1) * R), out, lse_.data());
  }

  static float* aligned(std::vector<float>& v) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
  }

  DecoderTokens<P>& tokens_;
  const DecoderSizes& s_;
  [[no_unique_address]] typename P::Thread products_;
  std::vector<float> normed_;
  std::vector<Q> heads_;
  std::vector<float> query_, result_, lse_;
};

}  // namespace aigc_fast

// One token for every sequence through all layers of a Llama-type decoder with quantised weights.
//
// The stages of a layer: norm and query, key, value; rotation, append and attention; output
// projection; norm, gate, up and their product; down projection. Each is cut into items that no
// other item of the stage depends on, so the bits are the same for any number of threads.
#pragma once

#include "attention.h"
#include "attention_int8.h"
#include "decoder_layers.h"
#include "stages.h"
#include "sums.h"

namespace aigc_fast {

constexpr int64_t kKeysOfItem = 64;  // keys of an item of attention

// P are the products of attention. Query and what attention gives have the type T of the caches
// too, but not where it has one byte: they need no room.
template <class P>
class DecoderStep {
  using T = typename P::C;
  static constexpr int R = P::R;
  using Q = std::conditional_t<sizeof(T) == 1, float, T>;

 public:
  DecoderStep(const DecoderSizes& s, std::vector<DecoderLayer<T>> layers,
              std::vector<int64_t> positions, std::vector<float> hidden, const float* cos,
              const float* sin, float eps, float scale, bool as_codes)
      : s_(s),
        layers_(std::move(layers)),
        positions_(std::move(positions)),
        cos_(cos),
        sin_(sin),
        eps_(eps),
        scale_(scale),
        as_codes_(as_codes),
        // Sequences with pages in common see each other's new tokens: all are written first.
        shared_(s.pages.table && s.batch > 1),
        items_(4 * torch::stable::get_num_threads()),
        residual_(std::move(hidden)),
        packed_(s.batch * s.packed()),
        attended_(s.batch * s.heads * s.head_dim),
        inner_(s.batch * s.inner) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t splits = positions_[b] / kKeysOfItem + 1;
      for (int64_t h = 0; h < s.kv_heads; ++h)
        for (int64_t i = 0; i < splits; ++i) units_.push_back({b, h, i, splits});
      split_ = split_ || splits > 1;
    }
    if (split_) results_.resize(units_.size() * result_size());
  }

  // The last hidden states, (batch, hidden_size), normalised by `norm`.
  std::vector<float> run(const float* norm) {
    Stages stages(kLayerStages * layers_.size(), torch::stable::get_num_threads());
    // More parts than threads: each thread that comes gets at least one.
    torch::stable::parallel_for(0, items_, 1,
                                [&](int64_t, int64_t) { Worker(*this, stages).run(); });
    std::vector<float> out(residual_.size());
    for (int64_t b = 0; b < s_.batch; ++b) normalize(b, norm, out.data() + b * s_.hidden);
    return out;
  }

 private:
  using Heads = Attention<P>;
  Heads attention(const DecoderLayer<T>& layer, int64_t b, int64_t head) const {
    const int64_t at = (s_.pages.table ? 0 : b * s_.key_batch) + head * s_.key_head;
    return {{1, 1, s_.group(), 1, s_.head_dim, s_.capacity},
            {layer.keys + at, s_.key_batch, s_.key_seq, 0},
            {layer.values + at, s_.key_batch, s_.key_seq, 0},
            scale_,
            s_.pages.of(b),
            {.key_scale = layer.key_scale + head, .value_scale = layer.value_scale + head}};
  }
  int64_t tiles() const { return (s_.group() + R - 1) / R; }
  int64_t result_size() const { return tiles() * attention(layers_[0], 0, 0).result_size(); }

  void normalize(int64_t b, const float* weight, float* out) const {
    const float* x = residual_.data() + b * s_.hidden;
    const float squares = sums_over<float, 1>(s_.hidden, [&](int64_t i, auto n, Vec<float>* sum) {
      const Vec<float> v = load(x + i, n);
      sum[0] += v * v;
    })[0];
    const float factor = 1 / std::sqrt(squares / s_.hidden + eps_);
    for_vectors<float>(s_.hidden, [&](int64_t i, auto n) {
      store(out + i, load(x + i, n) * factor * load(weight + i, n), n);
    });
  }

  // What one thread needs beside what all share.
  class Worker {
   public:
    Worker(DecoderStep& step, Stages& stages)
        : step_(step),
          s_(step.s_),
          stages_(stages),
          thread_(stages.join()),
          activations_(step.as_codes_),
          normed_(s_.hidden),
          gate_(s_.batch * kFew * kTileRows),
          rotated_(s_.group() * s_.head_dim),
          query_(step.tiles() * step.attention(step.layers_[0], 0, 0).query_size() + kLine),
          result_(step.result_size() + kLine),
          lse_(s_.group()) {}

    void run() {
      const size_t last = step_.layers_.size() - 1;
      for (size_t l = 0; l <= last; ++l) {
        const DecoderLayer<T>& layer = step_.layers_[l];
        const DecoderWeight& next = step_.layers_[std::min(l + 1, last)].qkv;
        const int64_t first = kLayerStages * l;
        linear(
            first, layer.qkv, layer.output, layer.output.tiles,
            [&] { normed(layer.qkv, layer.attention_norm); },
            [&](int64_t row, int64_t tile, const float* y) {
              put(step_.packed_.data() + row * s_.packed(), s_.packed(), tile, y);
            });
        if (step_.shared_)
          of_heads(first + 1, [&](int64_t b, int64_t head) { append(layer, b, head); });
        stages_.run(
            first + 2, thread_, step_.units_.size(), [] {}, [&](int64_t u) { attend(layer, u); },
            [] {});
        if (step_.split_)
          of_heads(first + 3, [&](int64_t b, int64_t head) { merge(layer, b, head); });
        linear(
            first + 4, layer.output, layer.gate_up, layer.gate_up.tiles / 2,
            [&] { given(layer.output, step_.attended_); },
            [&](int64_t row, int64_t tile, const float* y) { add(row, tile, y); });
        gated(first + 5, layer);
        linear(
            first + 6, layer.down, next, next.tiles, [&] { given(layer.down, step_.inner_); },
            [&](int64_t row, int64_t tile, const float* y) { add(row, tile, y); });
      }
    }

   private:
    static constexpr int L = kLanes<float>;
    static constexpr int64_t kFew = 8;    // tiles
    static constexpr int64_t kLine = 16;  // floats of a cache line, to which buffers are aligned

    // A product cut into items of consecutive tiles. `next` is the weight after it, of whose tiles
    // the first `next_tiles` are cut into shares.
    template <class Prepare, class Finish>
    void linear(int64_t stage, const DecoderWeight& weight, const DecoderWeight& next,
                int64_t next_tiles, Prepare&& prepare, Finish&& finish) {
      const int64_t items = std::min(weight.tiles, step_.items_);
      stages_.run(
          stage, thread_, items, prepare,
          [&](int64_t i) {
            multiply_tiles(weight.format, weight.blocks, activations_, s_.batch,
                           i * weight.tiles / items, (i + 1) * weight.tiles / items, finish);
          },
          [&] { fetch(next, next_tiles); });
    }

    template <class Item>
    void of_heads(int64_t stage, Item&& item) {
      stages_.run(
          stage, thread_, s_.batch * s_.kv_heads, [] {},
          [&](int64_t i) { item(i / s_.kv_heads, i % s_.kv_heads); }, [] {});
    }

    // Asks for the beginnings of the tiles that this thread will multiply first: without it every
    // product starts with a few trips to memory.
    void fetch(const DecoderWeight& weight, int64_t tiles) const {
      ask_for_tiles(weight.format, weight.blocks, stages_.first(thread_, tiles), tiles);
    }

    // silu(gate) * up; the gates are the first half of the tiles. A few tiles of one, then of the
    // other, for as many streams as a product takes.
    void gated(int64_t stage, const DecoderLayer<T>& layer) {
      const DecoderWeight& weight = layer.gate_up;
      const int64_t tiles = weight.tiles / 2, threads = stages_.threads();
      // As many for each thread, none of more than kFew tiles.
      const int64_t items = (tiles + kFew * threads - 1) / (kFew * threads) * threads;
      auto multiply = [&](int64_t begin, int64_t end, auto&& finish) {
        multiply_tiles(weight.format, weight.blocks, activations_, s_.batch, begin, end, finish);
      };
      stages_.run(
          stage, thread_, items, [&] { normed(weight, layer.mlp_norm); },
          [&](int64_t i) {
            const int64_t begin = i * tiles / items, end = (i + 1) * tiles / items;
            auto gate = [&](int64_t row, int64_t tile) {
              return gate_.data() + (row * kFew + tile - begin) * kTileRows;
            };
            multiply(begin, end, [&](int64_t row, int64_t tile, const float* y) {
              std::copy_n(y, kTileRows, gate(row, tile));
            });
            multiply(begin + tiles, end + tiles, [&](int64_t row, int64_t tile, const float* y) {
              float* out = step_.inner_.data() + row * s_.inner + (tile - tiles) * kTileRows;
              for (int j = 0; j < kTileRows; j += L) {
                const Vec<float> g = load(gate(row, tile - tiles) + j);
                store(out + j, g * sigmoid<float>(g) * load(y + j));
              }
            });
          },
          [&] { fetch(layer.down, layer.down.tiles); });
    }

    void append(const DecoderLayer<T>& layer, int64_t b, int64_t head) {
      const int64_t dim = s_.head_dim;
      const float* packed = step_.packed_.data() + b * s_.packed();
      const int64_t at = s_.entry(b, step_.positions_[b]) + head * s_.key_head;
      rotate(b, packed + (s_.heads + head) * dim, 1 / layer.key_scale[head], layer.keys + at);
      const float* value = packed + (s_.heads + s_.kv_heads + head) * dim;
      const float factor = 1 / layer.value_scale[head];
      for_vectors<float>(dim, [&](int64_t i, auto n) {
        store_cached(layer.values + at + i, load(value + i, n) * factor, n);
      });
    }

    void attend(const DecoderLayer<T>& layer, int64_t u) {
      const auto [b, head, split, splits] = step_.units_[u];
      const int64_t position = step_.positions_[b], dim = s_.head_dim;
      const float* packed = step_.packed_.data() + b * s_.packed();
      for (int64_t r = 0; r < s_.group(); ++r)
        rotate(b, packed + (head * s_.group() + r) * dim, 1, rotated_.data() + r * dim);
      if (!step_.shared_ && split == splits - 1) append(layer, b, head);
      const Heads attention = step_.attention(layer, b, head);
      const HeadRows<Q> query(rotated_.data(), 0, 0, s_.head_dim);
      attention.load_queries(query, 0, 0, 0, s_.group(), aligned(query_));
      const int64_t begin = split * kKeysOfItem, end = std::min(position + 1, begin + kKeysOfItem);
      float* result =
          splits == 1 ? aligned(result_) : step_.results_.data() + u * step_.result_size();
      const AttentionUnit part{0, 0, 1, 0, s_.group(), begin, end};
      attention.attend(part, position + 1, part, aligned(query_), result);
      if (splits == 1) write(attention, b, head, result, 1);
    }

    void merge(const DecoderLayer<T>& layer, int64_t b, int64_t head) {
      const auto unit = std::find_if(step_.units_.begin(), step_.units_.end(),
                                     [&](const KeyShare& u) { return u.b == b && u.head == head; });
      if (unit->splits == 1) return;
      const int64_t first = unit - step_.units_.begin();
      write(step_.attention(layer, b, head), b, head,
            step_.results_.data() + first * step_.result_size(), unit->splits);
    }

    void write(const Heads& attention, int64_t b, int64_t head, const float* results,
               int64_t splits) {
      Q* out = step_.attended_.data() + (b * s_.heads + head * s_.group()) * s_.head_dim;
      for (int64_t tile = 0; tile < step_.tiles(); ++tile)
        attention.merge(results + tile * attention.result_size(), splits, step_.result_size(), 0, 0,
                        tile * R, std::min(s_.group(), (tile + 1) * R), out, lse_.data());
    }

    template <class X>
    void rotate(int64_t b, const float* x, float factor, X* out) const {
      const int64_t half = s_.head_dim / 2, at = step_.positions_[b] * half;
      for_vectors<float>(half, [&](int64_t i, auto n) {
        const Vec<float> a = load(x + i, n), c = load(x + half + i, n);
        const Vec<float> cos = load(step_.cos_ + at + i, n);
        const Vec<float> sin = load(step_.sin_ + at + i, n);
        store_cached(out + i, (a * cos - c * sin) * factor, n);
        store_cached(out + half + i, (c * cos + a * sin) * factor, n);
      });
    }

    // The rows that the next product multiplies.
    void normed(const DecoderWeight& weight, const float* norm) {
      activations_.reset(weight.format, s_.batch);
      for (int64_t b = 0; b < s_.batch; ++b) {
        step_.normalize(b, norm, normed_.data());
        activations_.set(b, normed_.data(), s_.hidden);
      }
    }
    template <class X>
    void given(const DecoderWeight& weight, const std::vector<X>& rows) {
      const int64_t width = rows.size() / s_.batch;
      activations_.reset(weight.format, s_.batch);
      for (int64_t b = 0; b < s_.batch; ++b) activations_.set(b, rows.data() + b * width, width);
    }

    static void put(float* row, int64_t width, int64_t tile, const float* y) {
      const int64_t column = tile * kTileRows;
      for_vectors<float>(std::min(kTileRows, width - column),
                         [&](int64_t i, auto n) { store(row + column + i, load(y + i), n); });
    }
    void add(int64_t row, int64_t tile, const float* y) {
      float* x = step_.residual_.data() + row * s_.hidden + tile * kTileRows;
      for_vectors<float>(std::min(kTileRows, s_.hidden - tile * kTileRows),
                         [&](int64_t i, auto n) { store(x + i, load(x + i, n) + load(y + i), n); });
    }
    static float* aligned(std::vector<float>& v) {
      return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
    }

    DecoderStep& step_;
    const DecoderSizes& s_;
    Stages& stages_;
    int64_t thread_;
    [[no_unique_address]] typename P::Thread products_;
    Activations activations_;
    std::vector<float> normed_, gate_;
    std::vector<Q> rotated_;
    std::vector<float> query_, result_, lse_;
  };

  DecoderSizes s_;
  std::vector<DecoderLayer<T>> layers_;
  std::vector<int64_t> positions_;
  const float *cos_, *sin_;
  float eps_, scale_;
  bool as_codes_, shared_, split_ = false;
  int64_t items_;
  std::vector<KeyShare> units_;
  std::vector<float> residual_, packed_;
  std::vector<Q> attended_;
  std::vector<float> inner_, results_;
};

}  // namespace aigc_fast

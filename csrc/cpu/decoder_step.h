// One token for every sequence through all layers of a decoder with quantised weights.
//
// The stages of a layer: norm and query, key, value; rotation, append and attention; output
// projection; with experts, their scores and the choice of some; norm, gate, up and their product;
// down projection; where a norm stands behind attention and MLP, it and the addition. Each is cut
// into items that no other item of the stage depends on, so the bits are the same for any number of
// threads.
#pragma once

#include "decoder_attention.h"
#include "decoder_experts.h"
#include "decoder_layers.h"
#include "stages.h"

#include <aigc_fast/smooth_activation.h>

namespace aigc_fast {

template <class P>
class DecoderStep {
  using T = typename P::C;

 public:
  DecoderStep(const DecoderSizes& s, const DecoderNumbers& numbers,
              std::vector<DecoderLayer<T>> layers, std::vector<int64_t> positions,
              std::vector<float> hidden)
      : s_(s),
        numbers_(numbers),
        layers_(std::move(layers)),
        // Sequences with pages in common see each other's new tokens: all are written first.
        shared_(s.pages.table && s.batch > 1),
        items_(4 * torch::stable::get_num_threads()),
        tokens_(s_, numbers_, std::move(positions)),
        residual_(std::move(hidden)),
        branch_(layers_[0].post_mlp_norm ? residual_.size() : 0),
        inner_(s.inner_rows() * s.inner),
        experts_(s_) {
    size_t units = 0;
    for (const DecoderLayer<T>& layer : layers_)
      if (layer.shares->split) units = std::max(units, layer.shares->units.size());
    tokens_.results.resize(units * DecoderAttention<P>::result_size(tokens_));
  }

  // The last hidden states, (batch, hidden_size), normalised by `norm`.
  std::vector<float> run(const float* norm) {
    Stages stages(kLayerStages * layers_.size(), torch::stable::get_num_threads());
    // More parts than threads: each thread that comes gets at least one.
    torch::stable::parallel_for(0, items_, 1,
                                [&](int64_t, int64_t) { Worker(*this, stages).run(); });
    std::vector<float> out(residual_.size());
    for (int64_t b = 0; b < s_.batch; ++b)
      normalize(residual_.data() + b * s_.hidden, norm, out.data() + b * s_.hidden);
    return out;
  }

 private:
  static constexpr int kLayerStages = 11;

  void normalize(const float* x, const float* weight, float* out) const {
    scale_row(x, s_.hidden, rms_factor(x, s_.hidden, numbers_.eps), weight, out);
  }

  // What one thread needs beside what all share.
  class Worker {
   public:
    Worker(DecoderStep& step, Stages& stages)
        : step_(step),
          s_(step.s_),
          stages_(stages),
          thread_(stages.join()),
          attention_(step.tokens_),
          activations_(step.numbers_.as_codes),
          normed_(s_.hidden),
          gate_(s_.batch * kFew * kTileRows) {}

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
              put(step_.tokens_.packed.data() + row * s_.packed(), s_.packed(), tile, y,
                  layer.qkv_bias);
            });
        if (step_.shared_)
          of_heads(first + 1, [&](int64_t b, int64_t head) { attention_.append(layer, b, head); });
        stages_.run(
            first + 2, thread_, layer.shares->units.size(), [] {},
            [&](int64_t u) { attention_.attend(layer, u, !step_.shared_); }, [] {});
        if (layer.shares->split)
          of_heads(first + 3, [&](int64_t b, int64_t head) { attention_.merge(layer, b, head); });
        branch(first + 4, layer.output, layer.gate_up, layer.gate_up.tiles / 2,
               step_.tokens_.attended, layer.post_attention_norm);
        if (layer.router) route(first + 6, layer);
        gated(first + 8, layer);
        branch(first + 9, layer.down, next, next.tiles, step_.inner_, layer.post_mlp_norm);
      }
    }

   private:
    static constexpr int L = kLanes<float>;
    static constexpr int64_t kFew = 8;  // tiles

    // A product cut into items of consecutive tiles. `next` is the weight after it, of whose tiles
    // the first `next_tiles` are cut into shares.
    template <class Prepare, class Finish>
    void linear(int64_t stage, const DecoderWeight& weight, const DecoderWeight& next,
                int64_t next_tiles, Prepare&& prepare, Finish&& finish) {
      const int64_t items = std::min(weight.tiles, step_.items_);
      stages_.run(
          stage, thread_, items, prepare,
          [&](int64_t i) {
            multiply(weight, i * weight.tiles / items, (i + 1) * weight.tiles / items, finish);
          },
          [&] { fetch(next, next_tiles); });
    }

    // The products of some tiles with all rows; of experts, the sums over those that each row's
    // token was sent to.
    template <class Finish>
    void multiply(const DecoderWeight& weight, int64_t begin, int64_t end, Finish&& finish) {
      if (weight.experts == 0)
        return multiply_tiles(weight.format, weight.blocks, activations_, {0, s_.batch}, begin, end,
                              finish);
      for (int64_t b = 0; b < s_.batch; ++b) {
        sums_.assign((end - begin) * kTileRows, 0.0f);
        for (int64_t row = b * s_.per_token; row < (b + 1) * s_.per_token; ++row) {
          const int64_t first = step_.experts_.expert(row) * weight.tiles + begin;
          multiply_tiles(weight.format, weight.blocks, activations_, {row, row + 1}, first,
                         first + end - begin, [&](int64_t, int64_t tile, const float* y) {
                           float* sum = sums_.data() + (tile - first) * kTileRows;
                           for (int j = 0; j < kTileRows; j += L)
                             store(sum + j, load(sum + j) + load(y + j));
                         });
        }
        for (int64_t tile = begin; tile < end; ++tile)
          finish(b, tile, sums_.data() + (tile - begin) * kTileRows);
      }
    }

    // The product with `rows` is added to the residual stream; behind a norm, which must see all of
    // it before, in a stage of its own.
    template <class X>
    void branch(int64_t stage, const DecoderWeight& weight, const DecoderWeight& next,
                int64_t next_tiles, const std::vector<X>& rows, const float* norm) {
      linear(
          stage, weight, next, next_tiles, [&] { given(weight, rows); },
          [&](int64_t row, int64_t tile, const float* y) {
            const int64_t column = tile * kTileRows;
            if (norm)
              put(step_.branch_.data() + row * s_.hidden, s_.hidden, tile, y);
            else
              add(row, column, std::min(kTileRows, s_.hidden - column), y);
          });
      if (norm)
        stages_.run(
            stage + 1, thread_, s_.batch, [] {},
            [&](int64_t b) {
              step_.normalize(step_.branch_.data() + b * s_.hidden, norm, normed_.data());
              add(b, 0, s_.hidden, normed_.data());
            },
            [] {});
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
      if (weight.experts > 0) return;  // which of them is not known
      ask_for_tiles(weight.format, weight.blocks, stages_.first(thread_, tiles), tiles);
    }

    // Which experts each sequence's token is sent to.
    void route(int64_t stage, const DecoderLayer<T>& layer) {
      const int64_t parts = stages_.threads();
      stages_.run(
          stage, thread_, s_.batch * parts, [] {},
          [&](int64_t i) {
            const float* x = normed_row(i / parts, layer.mlp_norm);
            step_.experts_.score(i / parts, i % parts, parts, *layer.router, x);
          },
          [] {});
      stages_.run(
          stage + 1, thread_, s_.batch, [] {},
          [&](int64_t b) { step_.experts_.choose(b, step_.numbers_.normalize_experts); }, [] {});
    }

    // act(gate) * up; the gates are the first half of the tiles. A few tiles of one, then of the
    // other, for as many streams as a product takes.
    void gated(int64_t stage, const DecoderLayer<T>& layer) {
      const DecoderWeight& weight = layer.gate_up;
      const int64_t tiles = weight.tiles / 2, threads = stages_.threads();
      const bool sent = weight.experts > 0;
      // As many for each thread, none of more than kFew tiles; of each row that was sent somewhere.
      const int64_t parts = (tiles + kFew * threads - 1) / (kFew * threads) * threads;
      stages_.run(
          stage, thread_, parts * (sent ? s_.inner_rows() : 1),
          [&] { normed(weight, layer.mlp_norm); },
          [&](int64_t i) {
            const int64_t part = i % parts, unit = i / parts;
            const int64_t begin = part * tiles / parts, end = (part + 1) * tiles / parts;
            const int64_t b = unit / std::max<int64_t>(s_.per_token, 1);
            const int64_t gates = sent ? step_.experts_.expert(unit) * weight.tiles : 0;
            const RowRange rows = sent ? RowRange{b, b + 1} : RowRange{0, s_.batch};
            auto half = [&](int64_t first, auto&& finish) {
              multiply_tiles(weight.format, weight.blocks, activations_, rows, first + begin,
                             first + end, [&](int64_t row, int64_t tile, const float* y) {
                               finish(row - rows.first, tile - first, y);
                             });
            };
            auto gate = [&](int64_t row, int64_t tile) {
              return gate_.data() + (row * kFew + tile - begin) * kTileRows;
            };
            half(gates, [&](int64_t row, int64_t tile, const float* y) {
              std::copy_n(y, kTileRows, gate(row, tile));
            });
            const float factor = sent ? step_.experts_.factor(unit) : 1;
            half(gates + tiles, [&](int64_t row, int64_t tile, const float* y) {
              float* out = step_.inner_.data() + (unit + row) * s_.inner + tile * kTileRows;
              for (int j = 0; j < kTileRows; j += L) {
                const Vec<float> g = load(gate(row, tile) + j);
                const Vec<float> u = step_.numbers_.gelu ? gelu_argument<float>(g) : g;
                store(out + j, g * sigmoid<float>(u) * load(y + j) * factor);
              }
            });
          },
          [&] { fetch(layer.down, layer.down.tiles); });
    }

    // The residual stream of a sequence, normalised where there is a norm.
    const float* normed_row(int64_t b, const float* norm) {
      const float* x = step_.residual_.data() + b * s_.hidden;
      if (norm) step_.normalize(x, norm, normed_.data());
      return norm ? normed_.data() : x;
    }
    // The rows that the next product multiplies.
    void normed(const DecoderWeight& weight, const float* norm) {
      activations_.reset(weight.format, s_.batch);
      for (int64_t b = 0; b < s_.batch; ++b) activations_.set(b, normed_row(b, norm), s_.hidden);
    }
    template <class X>
    void given(const DecoderWeight& weight, const std::vector<X>& rows) {
      const int64_t count = weight.experts > 0 ? s_.inner_rows() : s_.batch;
      const int64_t width = rows.size() / count;
      activations_.reset(weight.format, count);
      for (int64_t r = 0; r < count; ++r) activations_.set(r, rows.data() + r * width, width);
    }

    static void put(float* row, int64_t width, int64_t tile, const float* y,
                    const float* bias = nullptr) {
      const int64_t column = tile * kTileRows;
      for_vectors<float>(std::min(kTileRows, width - column), [&](int64_t i, auto n) {
        const Vec<float> v = load(y + i, n);
        store(row + column + i, bias ? v + load(bias + column + i, n) : v, n);
      });
    }
    void add(int64_t row, int64_t column, int64_t count, const float* y) {
      float* x = step_.residual_.data() + row * s_.hidden + column;
      const float scale = step_.numbers_.residual_scale;
      for_vectors<float>(count, [&](int64_t i, auto n) {
        store(x + i, load(x + i, n) + load(y + i, n) * scale, n);
      });
    }

    DecoderStep& step_;
    const DecoderSizes& s_;
    Stages& stages_;
    int64_t thread_;
    DecoderAttention<P> attention_;
    Activations activations_;
    std::vector<float> normed_, gate_, sums_;
  };

  DecoderSizes s_;
  DecoderNumbers numbers_;
  std::vector<DecoderLayer<T>> layers_;
  bool shared_;
  int64_t items_;
  DecoderTokens<P> tokens_;
  std::vector<float> residual_, branch_, inner_;
  ChosenExperts experts_;
};

}  // namespace aigc_fast

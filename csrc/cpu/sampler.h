// Chooses one token of one row of logits in fp32. Nothing of the vocabulary's size is sorted:
// maxima of blocks bound the k-th largest logit, a histogram of probability mass bounds the
// nucleus, and what passes the bound is selected in linear time. Needs -ffp-contract=off: see
// gumbel.h.
#pragma once

#include "sampler_items.h"

#include <aigc_fast/lane_bits.h>

namespace aigc_fast {

// 128 k logits have 1002 blocks: enough for every usual top_k, and few to select from.
constexpr int64_t kLogitBlock = 128;

struct Settings {
  float temperature, top_k, top_p, min_p, typical_p, repetition, presence, frequency;
};
constexpr int kSettings = 8;

// One row at a time; a thread keeps its sampler, and so the memory.
class Sampler {
 public:
  float largest;  // logit of the row that was scanned last

  // Finds the maxima of the blocks; false if there is NaN or +inf, or nothing finite.
  bool scan(const float* logits, int64_t size) {
    x = logits;
    vocab = size;
    maxima.resize((size + kLogitBlock - 1) / kLogitBlock);
    Vec<int32_t> good = ~Vec<int32_t>{};
    F all = broadcast(-kInfinity);
    for (size_t b = 0; b < maxima.size(); ++b) {
      const float* p = x + b * kLogitBlock;
      F block = broadcast(-kInfinity);
      for_vectors<float>(std::min(kLogitBlock, size - int64_t(b) * kLogitBlock),
                         [&](int64_t i, auto n) {
                           const F v = load_or_inf(p + i, n);
                           good &= v < kInfinity;  // false for NaN
                           block = max<float>(block, v);
                         });
      maxima[b] = max_lanes(block);
      all = max<float>(all, block);
    }
    largest = max_lanes(all);
    for (int i = 0; i < gumbel::kWidth; ++i)
      if (!good[i]) return false;
    return largest > -kInfinity;
  }

  // log(sum(exp(x - largest)))
  float log_sum() const {
    I64 sum[2] = {};
    for_vectors<float>(vocab, [&](int64_t i, auto n) {
      const gumbel::Weights w = gumbel::weights(load_or_inf(x + i, n) - largest);
      sum[0] += w.low;
      sum[1] += w.high;
    });
    const int64_t rest = sum_lanes<int64_t>(sum[0] + sum[1]) - kOne;
    return gumbel::log1p(broadcast(float(rest) * 0x1p-40f))[0];
  }

  int64_t argmax() const {
    const int64_t block = std::find(maxima.begin(), maxima.end(), largest) - maxima.begin();
    return std::find(x + block * kLogitBlock, x + vocab, largest) - x;
  }

  int64_t sample(const Settings& s, uint64_t seed, uint64_t step) {
    if (s.temperature == 0 || s.top_k == 1) return argmax();
    rate = 1 / std::max(s.temperature, 1e-30f);
    bool all = true;
    if (s.top_k > 0 && s.top_k < vocab) {
      take_largest(static_cast<int64_t>(s.top_k));
      all = false;
    }
    if (s.top_p < 1) {
      const int64_t total = all ? take_bulk(s.top_p) : mass(0, items.size());
      all = false;
      items.resize(reach_mass(items, reach(total, s.top_p), std::greater<>(),
                              [&](size_t begin, size_t end) { return mass(begin, end); }));
    }
    if (s.min_p > 0) {
      const float least = gumbel::log(broadcast(std::max(s.min_p, 1e-30f)))[0];
      if (all) take([&](F v) { return scaled(v) >= least; });
      std::erase_if(items, [&](Item i) { return !(scaled(logit_of(i)) >= least); });
      all = false;
    }
    if (s.typical_p < 1) {
      if (all) take([&](F v) { return scaled(v) > kWeightless; });  // the others come last
      all = false;
      keep_typical(s.typical_p);
    }
    return all ? draw_from_all(seed, step) : draw(seed, step);
  }

 private:
  const float* x;
  int64_t vocab;
  float rate;
  std::vector<float> maxima, order;
  std::vector<Item> items;  // what survives, once something does not

  float scaled(float v) const { return (v - largest) * rate; }
  F scaled(F v) const { return (v - largest) * rate; }
  static int64_t reach(int64_t total, float top_p) {
    return std::max<int64_t>(1, static_cast<int64_t>(float(total) * top_p));
  }

  // Takes the finite logits that pass, which a block does only if its maximum does.
  template <class Pass>
  void take(Pass pass) {
    items.clear();
    for (size_t b = 0; b < maxima.size(); ++b) {
      if (!pass(broadcast(maxima[b]))[0]) continue;
      const int64_t begin = b * kLogitBlock;
      for_vectors<float>(std::min(kLogitBlock, vocab - begin), [&](int64_t i, auto n) {
        const F v = load_or_inf(x + begin + i, n);
        for (uint32_t lanes = lane_bits<float>(pass(v) & (v > -kInfinity)); lanes;
             lanes &= lanes - 1) {
          const int64_t token = begin + i + __builtin_ctz(lanes);
          items.push_back(item(x[token], token));
        }
      });
    }
  }

  // The k largest. At least k logits reach the k-th largest of the blocks' maxima.
  void take_largest(int64_t k) {
    float bound = -kInfinity;
    if (k <= int64_t(maxima.size())) {
      order = maxima;
      std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
      bound = order[k - 1];
    }
    take([&](F v) { return v >= bound; });
    if (int64_t(items.size()) > k) {
      std::nth_element(items.begin(), items.begin() + k, items.end(), std::greater<>());
      items.resize(k);
    }
  }

  // Takes a superset of the nucleus of all logits; returns the mass of all.
  int64_t take_bulk(float top_p) {
    constexpr int count = int(-kWeightless) * kBins + 1;
    std::vector<int64_t> bins(count);
    for (size_t b = 0; b < maxima.size(); ++b) {
      if (!(scaled(maxima[b]) > kWeightless)) continue;
      const float* p = x + b * kLogitBlock;
      for_vectors<float>(
          std::min(kLogitBlock, vocab - int64_t(b) * kLogitBlock), [&](int64_t i, auto n) {
            const F y = max<float>(scaled(load_or_inf(p + i, n)), broadcast(kWeightless));
            const gumbel::Weights w = gumbel::weights(y);
            const Vec<int32_t> bin = __builtin_convertvector(y * float(-kBins), Vec<int32_t>);
            int64_t weight[gumbel::kWidth];
            int32_t to[gumbel::kWidth];  // GCC would write the vector out for each bin[j]
            std::memcpy(weight, &w, sizeof weight);
            std::memcpy(to, &bin, sizeof to);
#pragma GCC unroll 16
            for (int j = 0; j < gumbel::kWidth; ++j) bins[to[j]] += weight[j];
          });
    }
    int64_t total = 0, sum = 0;
    for (int64_t mass : bins) total += mass;
    const int64_t enough = reach(total, top_p);
    int last = 0;
    while (last < count - 1 && (sum += bins[last]) < enough) ++last;
    take([&](F v) { return scaled(v) * float(-kBins) < float(last + 1); });
    return total;
  }

  // f(y, tokens) for vectors of items [begin, end); y of unused lanes is -inf.
  template <class Each>
  void for_items(size_t begin, size_t end, Each f) const {
    for (size_t i = begin; i < end; i += gumbel::kWidth) {
      const int n = static_cast<int>(std::min<size_t>(gumbel::kWidth, end - i));
      float logit[gumbel::kWidth];
      uint32_t number[gumbel::kWidth] = {};
      std::fill_n(logit, gumbel::kWidth, -kInfinity);
      for (int j = 0; j < n; ++j) {
        logit[j] = logit_of(items[i + j]);
        number[j] = token_of(items[i + j]);
      }
      U token;
      std::memcpy(&token, number, sizeof token);
      f(scaled(load(logit)), token);
    }
  }
  int64_t mass(size_t begin, size_t end) const {
    I64 sum = {};
    for_items(begin, end, [&](F y, U) {
      const gumbel::Weights w = gumbel::weights(y);
      sum += w.low + w.high;
    });
    return sum_lanes<int64_t>(sum);
  }

  // Keeps the items whose y is nearest to its mean and whose mass reaches typical_p, and all that
  // are as near as the last of them.
  void keep_typical(float typical_p) {
    std::vector<Near> near(items.size());
    int64_t total = 0, moment = 0;
    for_items(0, items.size(), [&, at = near.data()](F y, U) mutable {
      const gumbel::Weights w = gumbel::weights(y);
      int64_t weight[gumbel::kWidth];
      std::memcpy(weight, &w, sizeof weight);
      for (int j = 0; j < gumbel::kWidth && at != near.data() + near.size(); ++j, ++at) {
        *at = {y[j], weight[j]};
        total += weight[j];
        moment += static_cast<int64_t>(float(weight[j]) * std::max(y[j], -30.0f));
      }
    });
    const float mean = float(moment) * gumbel::reciprocal(float(total));
    for (Near& n : near) n.distance = std::abs(n.distance - mean);
    const float furthest = reaching(near, std::min(reach(total, typical_p), total));
    std::erase_if(items,
                  [&](Item i) { return !(std::abs(scaled(logit_of(i)) - mean) <= furthest); });
  }

  int64_t draw(uint64_t seed, uint64_t step) const {
    BestToken best;
    for_items(0, items.size(), [&](F y, U t) { best.offer(y, t, gumbel::noise(t, step, seed)); });
    return best.result();
  }

  int64_t draw_from_all(uint64_t seed, uint64_t step) const {
    BestToken best;
    const U lane = (U)lane_numbers<float>([](int i) { return i; });
    float tail[64];
    for (int64_t begin = 0; begin < vocab; begin += 64) {
      const float* p = x + begin;
      if (vocab - begin < 64) {
        std::fill_n(tail, 64, -kInfinity);
        std::copy(p, x + vocab, tail);
        p = tail;
      }
      for (int j = 0; j < 16; j += gumbel::kWidth) {
        const gumbel::Words w = gumbel::philox(lane + uint32_t(begin / 4 + j), step, seed);
        for (int word = 0; word < 4; ++word) {
          const int at = 16 * word + j;
          best.offer(scaled(load(p + at)), lane + uint32_t(begin + at),
                     gumbel::noise_of(w.word[word]));
        }
      }
    }
    return best.result();
  }
};

}  // namespace aigc_fast

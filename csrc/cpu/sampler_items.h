// Tokens and their logits as sampler.h holds them, in vectors and one by one. Needs
// -ffp-contract=off: see gumbel.h.
#pragma once

#include <algorithm>
#include <vector>

#include <aigc_fast/gumbel.h>

namespace aigc_fast {

using gumbel::F;
using gumbel::I64;
using gumbel::kOne;
using gumbel::U;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kWeightless = -28;  // exp(-28) < 2^-40
constexpr int kBins = 64;           // of the histograms, for a factor of e each

// A token and its logit as one number: larger logits first, then lower token numbers.
using Item = uint64_t;

inline Item item(float logit, int64_t token) {
  const float x = logit + 0.0f;  // -0 ties with 0
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t key = uint32_t(bits ^ (bits >> 31 & 0x7fffffff)) ^ 0x80000000u;
  return Item(key) << 32 | (0xffffffffu - uint32_t(token));
}
inline uint32_t token_of(Item item) { return 0xffffffffu - uint32_t(item); }
inline float logit_of(Item item) {
  const int32_t key = int32_t(uint32_t(item >> 32) ^ 0x80000000u);
  const int32_t bits = key ^ (key >> 31 & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class N>
AIGC_INLINE F load_or_inf(const float* p, N n) {  // lanes past the end are -inf
  if constexpr (!std::is_same_v<N, int>) {
    return load(p);
  } else {
    F v = broadcast(-kInfinity);
    std::memcpy(&v, p, n * sizeof(float));
    return v;
  }
}
inline float max_lanes(F v) {
  float m = v[0];
  for (int i = 1; i < gumbel::kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// How many of the items, in order, it takes for their mass to reach `enough`; these come first.
// Each round halves the range in which the last of them lies. mass(begin, end) is that of a range.
template <class N, class Before, class Mass>
size_t reach_mass(std::vector<N>& items, int64_t enough, Before before, Mass mass) {
  size_t begin = 0, end = items.size();
  while (end - begin > 1) {
    const size_t middle = (begin + end) / 2;
    const auto at = items.begin();
    std::nth_element(at + begin, at + middle, at + end, before);
    const int64_t first = mass(begin, middle);
    if (first >= enough) {
      end = middle;
    } else {
      enough -= first;
      begin = middle;
    }
  }
  return end;
}

// A token's weight, and how far its log-probability lies from a mean that is above kWeightless.
struct Near {
  float distance;
  int64_t weight;
};

// The distance within which the mass reaches `enough`. Only the tokens of one bin of a histogram
// are looked at in order.
inline float reaching(std::vector<Near>& tokens, int64_t enough) {
  const auto bin_of = [](const Near& n) {
    return static_cast<int>(std::min(n.distance, -kWeightless) * kBins);
  };
  std::vector<int64_t> bins(static_cast<int>(-kWeightless) * kBins + 1);
  for (const Near& n : tokens) bins[bin_of(n)] += n.weight;
  int bin = 0;
  while (bins[bin] < enough) enough -= bins[bin++];
  std::erase_if(tokens, [&](const Near& n) { return bin_of(n) != bin; });
  const size_t count = reach_mass(
      tokens, enough, [](const Near& a, const Near& b) { return a.distance < b.distance; },
      [&](size_t begin, size_t end) {
        int64_t sum = 0;
        for (size_t i = begin; i < end; ++i) sum += tokens[i].weight;
        return sum;
      });
  return tokens[count - 1].distance;
}

// The largest y + noise, and of equal ones the lowest token.
struct BestToken {
  F score = broadcast(-kInfinity);
  U token = {};

  AIGC_INLINE void offer(F y, U t, F noise) {
    const F s = y + noise;
    const auto better = (s > score) | ((s == score) & (Vec<int32_t>)(t < token));
    score = better ? s : score;
    token = better ? t : token;
  }
  int64_t result() const {
    int best = 0;
    for (int i = 1; i < gumbel::kWidth; ++i)
      if (score[i] > score[best] || (score[i] == score[best] && token[i] < token[best])) best = i;
    return token[best];
  }
};

}  // namespace aigc_fast

// What decode_attention attends to, and how.
#pragma once

#include <algorithm>

#include "cache.h"
#include "rows.h"

namespace aigc_fast {

struct AttentionShape {
  int64_t batch, q_len, heads, kv_heads, head_dim, capacity;
  int64_t window = int64_t{1} << 62;  // the newest keys that a query sees
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return q_len * group(); }
  bool masked = false;  // a mask says which of the q_len newest keys a query sees
  // Query `i` of a sequence sees none but the keys [oldest, visible), and all of [oldest, certain).
  int64_t visible(int64_t length, int64_t i) const { return masked ? length : causal(length, i); }
  int64_t certain(int64_t length, int64_t i) const {
    return masked ? std::max<int64_t>(0, length - q_len) : causal(length, i);
  }
  int64_t causal(int64_t length, int64_t i) const {
    return std::max<int64_t>(0, length - q_len + i + 1);
  }
  int64_t oldest(int64_t length, int64_t i) const {
    return std::max<int64_t>(0, length - q_len + i + 1 - window);
  }
};

template <class A>
struct ScoreOptions {
  A softcap = 0;                 // softcap * tanh(score / softcap), unless 0
  const A* slopes = nullptr;     // ALiBi, of each head
  const A* key_scale = nullptr;  // factors on the caches, of each key/value head
  const A* value_scale = nullptr;
  const bool* mask = nullptr;  // (q_len, q_len) of each sequence, mask_batch apart
  int64_t mask_batch = 0;
  const A* sinks = nullptr;  // a logit of each head that only the denominator knows
};

}  // namespace aigc_fast

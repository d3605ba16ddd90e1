// What decode_attention attends to, and how.
#pragma once

#include <algorithm>

#include "tensor.h"

namespace aigc_fast {

template <class T>
struct Rows {  // a tensor (batch, seq, head, head_dim) with its last dimension contiguous
  const T* data;
  int64_t batch, seq, head;
  Rows(const T* rows, int64_t batch, int64_t seq, int64_t head)
      : data(rows), batch(batch), seq(seq), head(head) {}
  explicit Rows(const Tensor& x)
      : data(aigc_fast::data<T>(x)), batch(x.stride(0)), seq(x.stride(1)), head(x.stride(2)) {}
};

struct Shape {
  int64_t batch, q_len, heads, kv_heads, head_dim, capacity;
  int64_t window = int64_t{1} << 62;  // the newest keys that a query sees
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return q_len * group(); }
  // Query `i` of a sequence sees the keys [oldest, visible).
  int64_t visible(int64_t length, int64_t i) const {
    return std::max<int64_t>(0, length - q_len + i + 1);
  }
  int64_t oldest(int64_t length, int64_t i) const {
    return std::max<int64_t>(0, length - q_len + i + 1 - window);
  }
};

// Where the caches are pages (page, slot, head, head_dim): the page of each `size` keys.
struct Pages {
  const int32_t* table = nullptr;
  int64_t batch = 0, page = 0;  // strides of the table
  int64_t size = 0;
  Pages() = default;
  // The table of a cache (page, slot, ...), which must have an entry for each of `sequences`.
  Pages(const Tensor& t, const Tensor& cache, int64_t sequences)
      : batch(t.dim() == 2 ? t.stride(0) : 0),
        page(t.dim() == 2 ? t.stride(1) : 0),
        size(cache.size(1)) {
    require(t.scalar_type() == ScalarType::Int && t.dim() == 2 && t.size(0) == sequences,
            "block_table must be int32 and have shape (", sequences, ", pages)");
    require(cache.size(0) > 0 && size > 0, "the caches must have at least one page");
    table = data<int32_t>(t);
  }

  int64_t at(int64_t b, int64_t index) const { return table[b * batch + index * page]; }
  // The table of one sequence.
  Pages of(int64_t b) const {
    Pages one = *this;
    one.table += b * batch;
    return one;
  }
  // The pages of the entries [begin, end) are among the `count` there are. What the rest of the
  // table holds is never read.
  void check(int64_t b, int64_t begin, int64_t end, int64_t count) const {
    for (int64_t i = begin / size; i * size < end; ++i)
      require(at(b, i) >= 0 && at(b, i) < count, "block_table must be in [0, ", count,
              ") where keys are valid, got ", at(b, i), " for page ", i, " of sequence ", b);
  }
};

template <class A>
struct ScoreOptions {
  A softcap = 0;                 // softcap * tanh(score / softcap), unless 0
  const A* slopes = nullptr;     // ALiBi, of each head
  const A* key_scale = nullptr;  // factors on the caches, of each key/value head
  const A* value_scale = nullptr;
  const A* sinks = nullptr;  // a logit of each head that only the denominator knows
};

}  // namespace aigc_fast

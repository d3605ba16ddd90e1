// Caches of keys and values: their pages, the types they hold, and the scales of their heads.
#pragma once

#include <vector>

#include "channels.h"
#include "narrow.h"
#include "tensor.h"

namespace aigc_fast {

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

// A number for each head, in the type of the arithmetic; empty if not given.
template <class A>
std::vector<A> of_heads(const MaybeTensor& x, const char* name, int64_t heads) {
  return x ? channel_values<A>(x, heads, name, 0) : std::vector<A>();
}

// Calls f with a value of the C++ type of the caches.
template <class F>
void dispatch_cache(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Char:
      return f(int8_t{});
    case ScalarType::Float8_e4m3fn:
      return f(e4m3{});
    case ScalarType::Float8_e5m2:
      return f(e5m2{});
    default:
      dispatch(x, "the caches", f);
  }
}
// The same where that is T or of one byte.
template <class T, class F>
void dispatch_cache_of(const Tensor& x, F&& f) {
  dispatch_cache(x, [&]<class C>(C) {
    if constexpr (std::is_same_v<T, C> || sizeof(C) == 1)
      f(C{});
    else
      require(false, "the caches must have the dtype of the tokens, int8 or fp8");
  });
}

}  // namespace aigc_fast

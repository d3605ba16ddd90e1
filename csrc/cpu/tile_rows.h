// Rows of a cache as a tile of the matrix unit takes them.
#pragma once

#include "amx.h"

#if AIGC_AMX
namespace aigc_fast {

// Where the rows of a tile lie, 64 bytes of each at a time; those from `count` on are zero.
template <class C>
struct TileRows {
  static constexpr int64_t kMost = 16;
  static constexpr int64_t kChunk = 64 / sizeof(C);  // numbers of a row in a tile
  const C* const* rows;
  int64_t count, stride;  // bytes from one row to the next
  bool copied;            // they are not evenly apart, or too few

  AIGC_INLINE explicit TileRows(const C* const* p, int64_t n = kMost)
      : rows(p),
        count(n),
        stride((p[1] - p[0]) * int64_t(sizeof(C))),
        copied(n < kMost || apart(0) || apart(kMost / 2 - 1)) {
    if (copied) stride = 64;
  }

  // The numbers from `at` on, in the cache or in `copy`.
  AIGC_INLINE const C* chunk(int64_t at, C* copy) const {
    if (!copied) return rows[0] + at;
    for (int64_t i = 0; i < kMost; ++i) {
      const __m512i row = i < count ? _mm512_loadu_si512(rows[i] + at) : __m512i{};
      _mm512_store_si512(copy + i * kChunk, row);
    }
    return copy;
  }

 private:
  // Whether two of the nine rows from i on are not `stride` apart.
  AIGC_INLINE bool apart(int64_t i) const {
    const __m512i steps =
        _mm512_sub_epi64(_mm512_loadu_si512(rows + i + 1), _mm512_loadu_si512(rows + i));
    return _mm512_cmpneq_epi64_mask(steps, _mm512_set1_epi64(stride));
  }
};

}  // namespace aigc_fast
#endif

// The products of attention.h over bf16 caches, by the matrix unit of newer Intel processors.
//
// The unit multiplies pairs of bf16 and adds in fp32. Queries and caches are bf16 as they are; a
// probability becomes the sum of two, right to 16 bits: the output, which is bf16, has 8. A pair
// of the values are two numbers of one token, so that a factor has a probability beside a zero: the
// rows (p, 0) give the even numbers, (0, p) the odd ones, and no number of the caches is ever
// moved. Subnormal numbers count as zero.
#pragma once

#include "attention_products.h"
#include "tile_rows.h"

#if AIGC_AMX
namespace aigc_fast {

// As Products<float, bf16, 4>, for a head_dim that is a multiple of 32.
struct Bf16Products {
  using A = float;
  using C = bf16;
  static constexpr int R = 4, L = 16, K = L / R;
  static constexpr int64_t kFewestKeys = kMostKeys;
  using Rows = TileRows<bf16>;
  static constexpr int64_t kKeys = Rows::kMost, kChunk = Rows::kChunk;
  using V = Vec<float>;
  int64_t head_dim;

  // 0 to 3: results [odd][part][R][number / 2]. 4: probabilities, of the same rows, [key]. 5: keys
  // or values. 6: queries [number / 2][R][number % 2]. 7: scores [key][R].
  static constexpr TileConfig kTiles{.bytes = {64, 64, 64, 64, 64, 64, 16, 16}};
  struct Thread : Tiles {
    Thread() : Tiles(&kTiles) {}
  };

  static bool fits(int64_t head_dim) { return head_dim % kChunk == 0 && has_amx_bf16(); }

  int64_t query_size() const { return head_dim * R; }

  // From [number / 32][even, odd][R][16], in place.
  AIGC_AMX_TARGET void prepare(float* query) const {
    for (int64_t at = 0; at < head_dim; at += kChunk) {
      I x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const I even = loaded(query + at * R + r * L), odd = loaded(query + at * R + (R + r) * L);
        x[r] = I(U(even) >> 16) | odd;
      }
      // From [row][number / 2] to [number / 2][row].
      exchange<1>(x[0], x[1]), exchange<1>(x[2], x[3]);
      exchange<2>(x[0], x[2]), exchange<2>(x[1], x[3]);
      exchange<4>(x[0], x[1]), exchange<4>(x[2], x[3]);
      exchange<8>(x[0], x[2]), exchange<8>(x[1], x[3]);
      for (int j = 0; j < R; ++j) std::memcpy(query + (at / 2 + j * 4) * R, &x[j], sizeof x[j]);
    }
  }

  AIGC_AMX_TARGET void scores(const float* query, const bf16* const* keys, int64_t count,
                              const bf16* const* next, float* scores) const {
    alignas(64) bf16 copy[kKeys * kChunk];
    for (int64_t k = 0; k < count; k += kKeys) {
      const Rows rows(keys + k);
      if (next) prefetch(next + k);
      _tile_zero(7);
      for (int64_t at = 0; at < head_dim; at += kChunk) {
        _tile_loadd(6, query + at / 2 * R, 4 * R);
        _tile_loadd(5, rows.chunk(at, copy), rows.stride);
        _tile_dpbf16ps(7, 5, 6);
      }
      _tile_stored(7, scores + k * R, 4 * R);
    }
  }

  AIGC_AMX_TARGET void add_values(const float* probabilities, const bf16* const* values,
                                  int64_t count, const float* decays, float* result,
                                  const bf16* const* next) const {
    alignas(64) I factors[kMostKeys / kKeys][16];
    for (int64_t k = 0; k < count; k += kKeys)
      factor_of(probabilities + k * R, count - k, factors[k / kKeys]);
    alignas(64) bf16 copy[kKeys * kChunk];
    alignas(64) float sums[4][16 * L];
    for (int64_t at = 0; at < head_dim; at += 4 * kChunk) {
      const int64_t chunks = std::min<int64_t>(4, (head_dim - at) / kChunk);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < count; k += kKeys) {
        const Rows rows(values + k, std::min(kKeys, count - k));
        if (next && at == 0) prefetch(next + k);
        _tile_loadd(4, factors[k / kKeys], 64);
        _tile_loadd(5, rows.chunk(at, copy), rows.stride);
        _tile_dpbf16ps(0, 4, 5);
        if (chunks < 2) continue;
        _tile_loadd(5, rows.chunk(at + kChunk, copy), rows.stride);
        _tile_dpbf16ps(1, 4, 5);
        if (chunks < 3) continue;
        _tile_loadd(5, rows.chunk(at + 2 * kChunk, copy), rows.stride);
        _tile_dpbf16ps(2, 4, 5);
        if (chunks < 4) continue;
        _tile_loadd(5, rows.chunk(at + 3 * kChunk, copy), rows.stride);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      // Zeros times inf or NaN: the even numbers may not know of the odd ones.
      if (!all_finite(sums[0], chunks * 16 * L))
        return Products<A, C, R>{head_dim}.add_values(probabilities, values, count, decays, result,
                                                      nullptr, at / kChunk);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            float* out = result + (at + chunk * kChunk) * R + (odd * R + r) * L;
            const float* sum = sums[chunk] + (2 * odd * R + r) * L;
            store(out, load(out) * decays[r] + (load(sum) + load(sum + R * L)));
          }
    }
  }

 private:
  typedef Vec<int32_t> I;
  typedef Vec<uint32_t> U;

  // 16 rows into the L2 cache: a block is more than the ways of L1 take. Left to the processor's
  // own prefetching, a key takes 25 ns instead of 28 where the L3 cache has it, and 42 instead of
  // 36 where memory has it.
  AIGC_INLINE void prefetch(const bf16* const* rows) const {
    for (int i = 0; i < kKeys; ++i)
      for (int64_t at = 0; at < head_dim; at += kChunk) __builtin_prefetch(rows[i] + at, 0, 2);
  }
  static bool all_finite(const float* p, int64_t count) {
    V products = {};
    for (int64_t i = 0; i < count; i += L) products += load(p + i) * 0.0f;
    return _mm512_cmpeq_ps_mask(__m512(products), __m512(V{})) == 0xffff;
  }
  static I loaded(const void* p) {
    I v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  // The probabilities of 16 keys, [key][R], of those from `count` on 0, as [odd][part][R][key] of
  // pairs.
  AIGC_INLINE static void factor_of(const float* probabilities, int64_t count, I* factor) {
    V p[R];
    for (int j = 0; j < R; ++j) p[j] = j * K < count ? load(probabilities + j * L) : V{};
    exchange<8>(p[0], p[2]), exchange<8>(p[1], p[3]);
    exchange<4>(p[0], p[1]), exchange<4>(p[2], p[3]);
    exchange<2>(p[0], p[2]), exchange<2>(p[1], p[3]);
    exchange<1>(p[0], p[1]), exchange<1>(p[2], p[3]);
    for (int r = 0; r < R; ++r) {
      const I top = I(p[r]) & ~0xffff;
      const I rest = I(p[r] - V(top)) + 0x8000;
      factor[r] = I(U(top) >> 16);
      factor[R + r] = I(U(rest) >> 16);
      factor[2 * R + r] = top;
      factor[3 * R + r] = rest & ~0xffff;
    }
  }
};

}  // namespace aigc_fast
#endif

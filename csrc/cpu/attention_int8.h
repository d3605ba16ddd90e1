// The products of attention.h over int8 caches, by the matrix unit of newer Intel processors.
//
// Queries and probabilities become integers of 32 bits, whose four bytes stand side by side in a
// factor: [byte][row]. The products of bytes and their sums are exact; only adding up the four, in
// fp32, rounds. So the results are as good as those of fp32 products, and no number of the caches
// is ever converted.
#pragma once

#include <bit>

#include "attention_products.h"
#include "tile_rows.h"

#if AIGC_AMX
namespace aigc_fast {

// As Products<float, int8_t, 4>, for a head_dim that is a multiple of 64.
struct Int8Products {
  using A = float;
  using C = int8_t;
  using Thread = Tiles;
  static constexpr int R = 4, L = 16, K = L / R;
  static constexpr int64_t kFewestKeys = kMostKeys;  // of a tile of probabilities
  using Rows = TileRows<int8_t>;
  static constexpr int64_t kChunk = Rows::kChunk;
  using V = Vec<float>;
  int64_t head_dim;

  // With one or two rows the unit is mostly idle, and vectors take 0.8 of its time.
  static bool fits(int64_t rows, int64_t head_dim) {
    return rows > 2 && head_dim % kChunk == 0 && has_amx_int8();
  }

  // For each chunk a tile, [number / 4][byte][R][number % 4]; then what the products of each row
  // are to be multiplied by.
  int64_t query_size() const { return head_dim * R + L; }

  // From [number / 16][R][number % 16], in place.
  AIGC_AMX_INT8_TARGET void prepare(float* query) const {
    constexpr float kOne = 0x1p30f;
    V factors = {}, units = {};
    for (int r = 0; r < R; ++r) {
      // As integers magnitudes have the same order, and NaN is the largest.
      __m512i top = _mm512_setzero_si512();
      for (int64_t i = r * L; i < head_dim * R; i += R * L)
        top = _mm512_max_epi32(
            _mm512_and_si512(_mm512_loadu_si512(query + i), _mm512_set1_epi32(0x7fffffff)), top);
      const float largest = std::max(std::bit_cast<float>(_mm512_reduce_max_epi32(top)), 0x1p-90f);
      for (int lane = r; lane < L; lane += R) {
        factors[lane] = kOne / largest;
        units[lane] = largest / kOne + (largest - largest);  // NaN for a row with NaN or inf
      }
    }
    alignas(64) uint8_t order[64];  // from [number][byte] to [byte][number]
    for (int i = 0; i < 64; ++i) order[i] = i % 16 * 4 + i / 16;
    const __m512i by_byte = _mm512_load_si512(order), carries = _mm512_set1_epi32(0x00808080);
    for (int64_t i = 0; i < head_dim * R; i += R * L) {
      I x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i n = _mm512_cvtps_epi32((__m512)(load(query + i + r * L) * factors[r]));
        // Signed bytes: what the lower ones lack the next one carries.
        const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(n, carries), carries);
        x[r] = (I)_mm512_permutexvar_epi8(by_byte, bytes);
      }
      // [row][byte][number / 4] to [number / 4][byte][row].
      exchange<1>(x[0], x[1]), exchange<1>(x[2], x[3]);
      exchange<2>(x[0], x[2]), exchange<2>(x[1], x[3]);
      for (int j = 0; j < R; ++j) std::memcpy(query + i + j * L, &x[j], sizeof x[j]);
    }
    store(query + head_dim * R, units);
  }

  AIGC_AMX_INT8_TARGET void scores(const float* query, const int8_t* const* keys, int64_t count,
                                   const int8_t* const* next, float* scores) const {
    alignas(64) int32_t sums[kMostKeys * L];  // [key][byte][row]
    const Rows some[4] = {Rows(keys), Rows(keys + 16), Rows(keys + 32), Rows(keys + 48)};
    alignas(64) int8_t copies[4][16 * kChunk];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < head_dim; at += kChunk) {
      _tile_loadd(6, query + at * R, 64);
      _tile_loadd(4, some[0].chunk(at, copies[0]), some[0].stride);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(5, some[1].chunk(at, copies[1]), some[1].stride);
      _tile_dpbssd(1, 5, 6);
      _tile_loadd(4, some[2].chunk(at, copies[2]), some[2].stride);
      _tile_dpbssd(2, 4, 6);
      _tile_loadd(5, some[3].chunk(at, copies[3]), some[3].stride);
      _tile_dpbssd(3, 5, 6);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 16 * L, 64);
    _tile_stored(2, sums + 32 * L, 64);
    _tile_stored(3, sums + 48 * L, 64);
    const V units = load(query + head_dim * R);
    V weights;
    for (int lane = 0; lane < L; ++lane) weights[lane] = 1 << lane / R * 8;
    for (int64_t k = 0; k < count; k += K) {
      V part[K];
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) {
        part[i] = __builtin_convertvector(loaded(sums + (k + i) * L), V) * weights;
        if (next) prefetch(next[k + i]);
      }
      store(scores + k * R, sum_each<float, R>(part) * units);
    }
  }

  AIGC_AMX_INT8_TARGET void add_values(const float* probabilities, const int8_t* const* values,
                                       int64_t count, const float* decays, float* result,
                                       const int8_t* const* next) const {
    const int64_t groups = (count + K - 1) / K;  // of four keys
    alignas(64) int32_t tile[L * L];             // of probabilities: [byte][row][key]
    tile_of(probabilities, groups, tile);
    _tile_loadd(7, tile, 64);
    alignas(64) int32_t mixed[4 * L * L];  // tiles of values: [group][16 numbers][key % 4]
    for (int64_t at = 0; at < head_dim; at += kChunk) {
      for (int64_t j = 0; j < groups; ++j) {
        const auto row = [&](int64_t k) { return _mm512_loadu_si512(values[4 * j + k] + at); };
        const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
        if (next)
          for (int64_t k = 0; k < K; ++k) __builtin_prefetch(next[4 * j + k] + at, 0, 2);
        const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
        // Tile t takes the numbers 16 * i + 4 * t + (0..3) for i in 0..3.
        _mm512_store_si512(mixed + (0 * L + j) * L, _mm512_unpacklo_epi16(ab0, cd0));
        _mm512_store_si512(mixed + (1 * L + j) * L, _mm512_unpackhi_epi16(ab0, cd0));
        _mm512_store_si512(mixed + (2 * L + j) * L, _mm512_unpacklo_epi16(ab1, cd1));
        _mm512_store_si512(mixed + (3 * L + j) * L, _mm512_unpackhi_epi16(ab1, cd1));
      }
      multiply(mixed);
      for (int r = 0; r < R; ++r) {
        V sum[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
          sum[t] = V{};
#pragma GCC unroll 4
          for (int byte = 0; byte < 4; ++byte)
            sum[t] += __builtin_convertvector(loaded(mixed + (t * L + byte * R + r) * L), V) *
                      (0x1p-31f * (1 << 8 * byte));
        }
        // From [tile][i][4 numbers] to [i][tile][4 numbers].
        exchange<8>(sum[0], sum[2]), exchange<8>(sum[1], sum[3]);
        exchange<4>(sum[0], sum[1]), exchange<4>(sum[2], sum[3]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          float* out = result + at * R + (i * R + r) * L;
          store(out, load(out) * decays[r] + sum[i]);
        }
      }
    }
  }

 private:
  typedef Vec<int32_t> I;

  // Into the L2 cache: keys and values of a block, 1 KB apart from one token to the next, are more
  // than the ways of L1 take.
  AIGC_INLINE void prefetch(const int8_t* row) const {
    for (int64_t at = 0; at < head_dim; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
  static I loaded(const int32_t* p) {
    I v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  // The probabilities of 4 * groups keys, [key][row], as integers; of the others 0.
  AIGC_AMX_INT8_TARGET static void tile_of(const float* probabilities, int64_t groups,
                                           int32_t* tile) {
    alignas(64) uint8_t order[64];  // [key][row][byte] to [byte][row][key]
    for (int i = 0; i < 64; ++i) order[i] = i % 4 * 16 + i / 4 % 4 * 4 + i / 16;
    const __m512i by_byte = _mm512_load_si512(order);
    I x[L] = {};
    for (int64_t j = 0; j < groups; ++j) {
      const V p = load(probabilities + j * L) * 0x1p31f;
      x[j] = (I)_mm512_permutexvar_epi8(by_byte, _mm512_cvtps_epu32((__m512)p));
    }
    transpose(x);
    for (int i = 0; i < L; ++i) std::memcpy(tile + i * L, &x[i], sizeof x[i]);
  }

  // The products of tile 7 with four tiles, in their place. What lies in `mixed` behind the last
  // group meets zeros.
  AIGC_AMX_INT8_TARGET static void multiply(int32_t* mixed) {
    _tile_zero(0);
    _tile_loadd(4, mixed, 64);
    _tile_dpbusd(0, 7, 4);
    _tile_zero(1);
    _tile_loadd(5, mixed + L * L, 64);
    _tile_dpbusd(1, 7, 5);
    _tile_zero(2);
    _tile_loadd(4, mixed + 2 * L * L, 64);
    _tile_dpbusd(2, 7, 4);
    _tile_zero(3);
    _tile_loadd(5, mixed + 3 * L * L, 64);
    _tile_dpbusd(3, 7, 5);
    _tile_stored(0, mixed, 64);
    _tile_stored(1, mixed + L * L, 64);
    _tile_stored(2, mixed + 2 * L * L, 64);
    _tile_stored(3, mixed + 3 * L * L, 64);
  }
};

}  // namespace aigc_fast
#endif

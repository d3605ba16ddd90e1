// The products of attention.h over int8 caches, with the instruction that adds two products of
// 16-bit integers at once: half as many as of fp32, and no number of the caches is converted to it.
//
// For queries of 16 bits, which become integers by the largest of their row, as probabilities do by
// the largest of their block: each is off by at most 2^-16 of that. Where that is much to the
// others, what was rounded off is multiplied too. The sums are exact.
#pragma once

#include <vector>

#include "attention_products.h"
#include "narrow.h"

#if defined(__AVX512VNNI__)
#define AIGC_INT8_DOT 1
namespace aigc_fast {

template <int rows>
struct Int8DotProducts : Products<float, int8_t, rows> {
  using Base = Products<float, int8_t, rows>;
  using Base::head_dim, Base::L, Base::K, Base::R;
  using typename Base::V;
  static constexpr int64_t kStep = 2 * L;  // numbers of a row in a vector
  static_assert(K % 2 == 0);

  // Sums of more products might leave 32 bits.
  static bool fits(int64_t head_dim) { return head_dim <= 512; }

  // Twice the queries; behind them what the products of each row are to be multiplied by, those of
  // the first part and those of the second.
  int64_t query_size() const { return Base::query_size() + 2 * L; }

  // From [number / 32][half][R][16] to int16 [part][number / 32][R][32], in place: the integers,
  // and in units of 1 / kOne what they were rounded by.
  void prepare(float* query) const {
    const int64_t size = Base::query_size();
    V scales = {}, units = {}, low_units = {};
    for (int r = 0; r < R; ++r) {
      // As integers magnitudes have the same order, and NaN is the largest.
      I top = {};
      V sum = {};
      for (int64_t i = r * L; i < size; i += R * L) {
        const I bits = reinterpret_cast<I>(load(query + i)) & 0x7fffffff;
        top = bits > top ? bits : top;
        sum += reinterpret_cast<V>(bits);
      }
      const float largest =
          std::max(std::bit_cast<float>(_mm512_reduce_max_epi32((__m512i)top)), kSmallest);
      scales[r] = kOne / largest;
      // Where one number is far above the others of its row, these would be mostly rounded away.
      const float others = (sum_lanes<float>(sum) - largest) / head_dim;
      for (int lane = r; lane < L; lane += R) {
        units[lane] = largest / kOne + (largest - largest);  // NaN for a row with NaN or inf
        low_units[lane] = others < largest * (1.0f / 64) ? units[lane] / kOne : 0;
      }
    }
    std::vector<float> low(size / 2);
    for (int64_t i = 0; i < size; i += 2 * R * L)
      for (int r = 0; r < R; ++r) {
        __m256i high[2], rest[2];
        for (int h = 0; h < 2; ++h) {
          const V q = load(query + i + (h * R + r) * L) * scales[r];
          const I whole = rounded(q);
          high[h] = _mm512_cvtepi32_epi16((__m512i)whole);
          rest[h] = _mm512_cvtepi32_epi16(
              (__m512i)rounded((q - __builtin_convertvector(whole, V)) * kOne));
        }
        _mm512_storeu_si512(query + i / 2 + r * L, joined(high));
        _mm512_storeu_si512(low.data() + i / 2 + r * L, joined(rest));
      }
    std::copy(low.begin(), low.end(), query + size / 2);
    store(query + size, units);
    store(query + size + L, low_units);
  }

  void scores(const float* query, const int8_t* const* keys, int64_t count,
              const int8_t* const* next, float* scores) const {
    const int64_t size = Base::query_size();
    const V units = load(query + size), low_units = load(query + size + L);
    const bool twice = _mm512_movepi32_mask((__m512i)(low_units > 0));
    for (int64_t k = 0; k < count; k += K) {
      V score = dot(query, keys + k, next ? next + k : nullptr) * units;
      if (twice) score += dot(query + size / 2, keys + k, nullptr) * low_units;
      store(scores + k * R, score);
    }
  }

  void add_values(const float* probabilities, const int8_t* const* values, int64_t count,
                  const float* decays, float* result, const int8_t* const* next) const {
    const int64_t padded = (count + K - 1) / K * K;
    V top = broadcast(kSmallest), sum = {};
    for (int64_t k = 0; k < padded; k += K) {
      const V p = load(probabilities + k * R);
      top = max<float>(top, p);
      sum += p;
    }
    top = over_keys<float, R>(top, max<float>);
    sum = over_keys<float, R>(sum, [](V a, V b) { return a + b; });
    alignas(64) int32_t high[kMostKeys * R], low[kMostKeys * R];
    for (int64_t k = 0; k < padded; k += K) {
      const V p = load(probabilities + k * R) * (kOne / top);
      const I whole = rounded(p);
      store_pairs(high + k * R, whole);
      store_pairs(low + k * R, rounded((p - __builtin_convertvector(whole, V)) * kOne));
    }
    const V units = top / kOne;
    add_products(high, values, padded, units, decays, result, next);
    // Where one key outweighs the rest of its block, as the first of a text may, the rest would be
    // mostly rounded away, and if that key's value is small, the rest is what is seen.
    const auto outweighed = sum - top < top * 0.5f;
    if (_mm512_movepi32_mask((__m512i)outweighed)) {
      alignas(64) float ones[L];
      store(ones, broadcast(1.0f));
      add_products(low, values, padded, units / kOne, ones, result, nullptr);
    }
  }

 private:
  typedef Vec<int32_t> I;
  static constexpr float kOne = 32767, kSmallest = 0x1p-90f;
  static constexpr int kPairs = 8 / R;  // whose sums stay in registers

  static I rounded(V x) { return (I)_mm512_cvtps_epi32((__m512)x); }
  // Those of key k, and of the one after it in the upper halves: [k][row], where k is even.
  static void store_pairs(int32_t* to, I x) {
    const __m512i v = (__m512i)x;
    const __m512i after = _mm512_slli_epi32(_mm512_alignr_epi32(v, v, R), 16);
    _mm512_store_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, v, after));
  }
  static __m512i joined(const __m256i* halves) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
  }
  static __m512i wide(const int8_t* p, __mmask32 some) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(some, p));
  }
  AIGC_INLINE static void add(I& sum, __m512i a, __m512i b) {
    sum = (I)_mm512_dpwssd_epi32((__m512i)sum, a, b);
  }

  // result = result * decays + factors * values * units.
  void add_products(const int32_t* factors, const int8_t* const* values, int64_t count, V units,
                    const float* decays, float* result, const int8_t* const* next) const {
    int64_t pair = 0;
    for (; (pair + kPairs) * kStep <= head_dim; pair += kPairs)
      add_pairs<kPairs>(factors, values, count, pair, units, decays, result, next);
    for (; pair * kStep < head_dim; ++pair)
      add_pairs<1>(factors, values, count, pair, units, decays, result, next);
  }

  // The products of K keys: lane k * R + r.
  AIGC_INLINE V dot(const float* query, const int8_t* const* keys,
                    const int8_t* const* next) const {
    I sums[L] = {};
    for (int64_t d = 0; d < head_dim; d += kStep) {
      const __mmask32 some = first_bytes(head_dim - d);
      __m512i q[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) q[r] = _mm512_loadu_si512(query + d / 2 * R + r * L);
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        if (next) this->prefetch(next[i], d);
        const __m512i x = wide(keys[i] + d, some);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) add(sums[i * R + r], x, q[r]);
      }
    }
    return __builtin_convertvector(sum_each<int32_t>(sums), V);
  }

  // P vectors of each value, from `pair` on.
  template <int P>
  void add_pairs(const int32_t* factors, const int8_t* const* values, int64_t count, int64_t pair,
                 V units, const float* decays, float* result, const int8_t* const* next) const {
    I sums[2 * P][R] = {};
    const int64_t first = pair * kStep;
    for (int64_t k = 0; k < count; k += 2) {
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) {
        const int64_t d = first + j * kStep;
        if (next) this->prefetch(next[k], d), this->prefetch(next[k + 1], d);
        const __mmask32 some = first_bytes(head_dim - d);
        const __m512i a = wide(values[k] + d, some), b = wide(values[k + 1] + d, some);
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512i p = _mm512_set1_epi32(factors[k * R + r]);
          add(sums[2 * j][r], low, p);
          add(sums[2 * j + 1][r], high, p);
        }
      }
    }
    float* out = result + pair * 2 * R * L;
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        // Unpacked are the numbers 0..3 and 4..7 of every eight.
        const I low = sums[2 * j][r], high = sums[2 * j + 1][r];
        const I halves[2] = {__builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6,
                                                     7, 20, 21, 22, 23),
                             __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12,
                                                     13, 14, 15, 28, 29, 30, 31)};
        for (int half = 0; half < 2; ++half) {
          float* to = out + ((2 * j + half) * R + r) * L;
          const V sum = __builtin_convertvector(halves[half], V) * units[r];
          store(to, load(to) * decays[r] + sum);
        }
      }
  }
};

}  // namespace aigc_fast
#endif

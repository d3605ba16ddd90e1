// The products of attention.h over bf16 caches, with the instruction that adds two products of bf16
// at once: half as many as of fp32, and no key is converted.
//
// Values are left as they are: their factors, the probabilities, would need two bf16 each.
// Subnormal numbers count as zero.
#pragma once

#include "attention_products.h"
#include "bf16_dot.h"

#if AIGC_BF16_DOT
namespace aigc_fast {

template <int rows>
struct Bf16DotProducts : Products<float, bf16, rows> {
  using Base = Products<float, bf16, rows>;
  using Base::head_dim, Base::L, Base::K, Base::R;
  using typename Base::V;
  static constexpr int64_t kStep = 2 * L;  // numbers of a key in a vector

  // From [number / 32][even, odd][R][16] to [number / 32][R][32], in place.
  void prepare(float* query) const {
    typedef Vec<uint32_t> U;
    const auto bits = [&](int64_t at) { return reinterpret_cast<U>(load(query + at * L)); };
    for (int64_t i = 0; i * kStep < head_dim; ++i)
      for (int r = 0; r < R; ++r) {
        const U both = bits(2 * i * R + r) >> 16 | bits((2 * i + 1) * R + r);
        store(query + (i * R + r) * L, reinterpret_cast<V>(both));
      }
  }

  __attribute__((target("avx512bf16"), noinline)) void scores(const float* query,
                                                              const bf16* const* keys,
                                                              int64_t count,
                                                              const bf16* const* next,
                                                              float* scores) const {
    for (int64_t k = 0; k < count; k += K) {
      V sums[L] = {};
      for (int64_t d = 0; d < head_dim; d += kStep) {
        const __mmask64 some = first_bytes((head_dim - d) * sizeof(bf16));
        __m512i q[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) q[r] = _mm512_loadu_si512(query + d / 2 * R + r * L);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
          if (next) this->prefetch(next[k + i], d);
          const __m512i x = _mm512_maskz_loadu_epi8(some, keys[k + i] + d);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            V& sum = sums[i * R + r];
            sum = V(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(q[r])));
          }
        }
      }
      store(scores + k * R, sum_each<float>(sums));
    }
  }
};

}  // namespace aigc_fast
#endif

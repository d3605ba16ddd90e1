// The product of quantized.h: one kernel for each format and number of rows.
#include "quantized.h"

#include <aigc_fast/cpu_features.h>

namespace aigc_fast {
namespace {

typedef Vec<int32_t> I32;
constexpr int kParts = 64 / kVectorBytes;  // vectors of 16 lanes

// sum + the products of four unsigned bytes of each lane with the four signed ones at x.
AIGC_INLINE I32 add_dot4(I32 sum, I32 bytes, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
  const I32 even = bytes & 0x00ff00ff, odd = (bytes >> 8) & 0x00ff00ff;
  const __m256i x02 = _mm256_set1_epi32((x[0] & 0xffff) | x[2] << 16);
  const __m256i x13 = _mm256_set1_epi32((x[1] & 0xffff) | x[3] << 16);
  return sum + (I32)_mm256_madd_epi16((__m256i)even, x02) +
         (I32)_mm256_madd_epi16((__m256i)odd, x13);
#else
  for (int j = 0; j < 4; ++j) sum += ((bytes >> 8 * j) & 255) * int32_t(x[j]);
  return sum;
#endif
}

// 16 numbers of fp16.
AIGC_INLINE void load_halves(const uint8_t* p, Vec<float>* v) {
  for (int i = 0; i < kParts; ++i)
    v[i] = load(reinterpret_cast<const fp16*>(p) + i * kLanes<float>);
}

AIGC_INLINE void load_bytes(const uint8_t* p, I32* v) {
  for (int i = 0; i < kParts; ++i) std::memcpy(&v[i], p + i * kVectorBytes, kVectorBytes);
}

// What a core gets from memory depends on how it asks. Intel's (Sapphire Rapids): 16 GB/s by four
// streams and what comes after them asked for early, 12 by one that asks 2 KB ahead. AMD's (Zen 5):
// 35 GB/s by four, 41 by one that asks 8 KB ahead, 33 by one that asks 2 KB ahead. With several
// rows, and what is left of a share, tiles come one at a time and 8 KB ahead on either.
constexpr int64_t kBytesAhead = 8192;
bool likes_many_streams() {
  static const bool intel = cpu_features()["intel"];
  return intel;
}

// 16 outputs of N tiles for each of the M rows from `first` on: out[(n * M + m) * 16 + i].
template <int bits, bool has_minimum, int group_size, int N, int M>
void tiles_times_codes(const QuantizedFormat& f, const uint8_t* block, const Activations& x,
                       int64_t first, float* out) {
  const int64_t code_bytes = group_size ? kTileRows * group_size * bits / 8 : f.code_bytes();
  const int64_t block_bytes = code_bytes + (has_minimum ? 4 : 2) * kTileRows;
  const int64_t columns = f.columns(), tile_bytes = f.groups * block_bytes;
  Vec<float> result[N][M][kParts] = {};
  const int8_t* codes = x.codes(first);
  for (int64_t g = 0; g < f.groups; ++g, block += block_bytes) {
    I32 sum[N][M][kParts];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < kParts; ++i) sum[n][m][i] = I32{} + x.starts(first + m)[g];
#pragma GCC unroll 8
    for (int64_t at = 0; at < code_bytes; at += 64, codes += 32 / bits) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const uint8_t* p = block + n * tile_bytes + at;
        I32 raw[kParts];
        load_bytes(p, raw);
        __builtin_prefetch(p + (N == 1 ? kBytesAhead : N * tile_bytes), 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const I32 low = bits == 4 ? raw[i] & 0x0f0f0f0f : raw[i];
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m)
            sum[n][m][i] = add_dot4(sum[n][m][i], low, codes + m * columns);
          if constexpr (bits == 4) {
            const I32 high = (raw[i] >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
              sum[n][m][i] = add_dot4(sum[n][m][i], high, codes + m * columns + 4);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const uint8_t* p = block + n * tile_bytes + code_bytes;
      Vec<float> scale[kParts], minimum[kParts];
      load_halves(p, scale);
      __builtin_prefetch(p + (N == 1 ? kBytesAhead : N * tile_bytes), 0, 2);
      if constexpr (has_minimum) load_halves(p + 2 * kTileRows, minimum);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float by = x.scales(first + m)[g], total = x.sums(first + m)[g];
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          result[n][m][i] += __builtin_convertvector(sum[n][m][i], Vec<float>) * (scale[i] * by);
          if constexpr (has_minimum) result[n][m][i] += minimum[i] * total;
        }
      }
    }
  }
  std::memcpy(out, result, sizeof result);
}

// The code in the low bits of each lane, counted from the middle of its range.
template <int bits>
AIGC_INLINE Vec<float> from_middle(I32 lanes) {
#if defined(__AVX512F__)
  if constexpr (bits == 4) {  // one lookup, by the low four bits, for three instructions
    const Vec<float> values{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (Vec<float>)_mm512_permutexvar_ps((__m512i)lanes, (__m512)values);
  }
#endif
  return __builtin_convertvector((lanes & ((1 << bits) - 1)) - (1 << (bits - 1)), Vec<float>);
}

// The same for activations as they are. Codes count from the middle of their range, so that no
// large terms cancel.
template <int bits, bool has_minimum, int group_size, int N, int M>
void tiles_times_floats(const QuantizedFormat& f, const uint8_t* block,
                        const Activations& activations, int64_t first, float* out) {
  constexpr int middle = 1 << (bits - 1);
  const float *x = activations.floats(first), *totals = activations.sums(first);
  // Two sums in turn, so that an addition does not wait for the one before: as many for any M,
  // which gives a row the same bits among any others.
  Vec<float> result[N][M][kParts] = {};
  const int64_t code_bytes = group_size ? kTileRows * group_size * bits / 8 : f.code_bytes();
  const int64_t block_bytes = code_bytes + (has_minimum ? 4 : 2) * kTileRows;
  const int64_t columns = f.columns(), tile_bytes = f.groups * block_bytes;
  for (int64_t g = 0; g < f.groups; ++g, block += block_bytes) {
    Vec<float> sums[2][N][M][kParts] = {};
#pragma GCC unroll 8
    for (int64_t at = 0; at < code_bytes; at += 64, x += 32 / bits) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const uint8_t* p = block + n * tile_bytes + at;
        I32 raw[kParts];
        load_bytes(p, raw);
        __builtin_prefetch(p + (N == 1 ? kBytesAhead : N * tile_bytes), 0, 2);
#pragma GCC unroll 8
        for (int k = 0; k < 32 / bits; ++k) {
          const int shift = bits == 8 ? 8 * k : 8 * (k % 4) + k / 4 * 4;
#pragma GCC unroll 4
          for (int i = 0; i < kParts; ++i) {
            const Vec<float> w = from_middle<bits>(raw[i] >> shift);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[k % 2][n][m][i] += w * x[m * columns + k];
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const uint8_t* p = block + n * tile_bytes + code_bytes;
      Vec<float> scale[kParts], minimum[kParts];
      load_halves(p, scale);
      if constexpr (has_minimum) load_halves(p + 2 * kTileRows, minimum);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          result[n][m][i] += (sums[0][n][m][i] + sums[1][n][m][i]) * scale[i];
          if constexpr (has_minimum)
            result[n][m][i] += (minimum[i] + scale[i] * float(middle)) * totals[m * f.groups + g];
        }
    }
  }
  std::memcpy(out, result, sizeof result);
}

// Calls f(bits, has_minimum, group_size), all compile-time constants; the group size is 0 where it
// is not the usual one.
template <class F>
AIGC_INLINE void with_format(const QuantizedFormat& f, F&& call) {
  auto with_group = [&](auto bits, auto has_minimum) {
    f.group_size == 32 ? call(bits, has_minimum, std::integral_constant<int, 32>{})
                       : call(bits, has_minimum, std::integral_constant<int, 0>{});
  };
  auto with_minimum = [&](auto bits) {
    f.has_minimum ? with_group(bits, std::true_type{}) : with_group(bits, std::false_type{});
  };
  f.bits == 4 ? with_minimum(std::integral_constant<int, 4>{})
              : with_minimum(std::integral_constant<int, 8>{});
}

// Calls f(first, M) for runs of at most M rows, halving M for the rest, M a compile-time constant.
template <int M, class F>
AIGC_INLINE void for_row_runs(RowRange rows, F&& f) {
  for (; rows.first + M <= rows.end; rows.first += M)
    f(rows.first, std::integral_constant<int, M>{});
  if constexpr (M > 1) for_row_runs<M / 2>(rows, f);
}

// Tiles read at a time for one row, and rows multiplied at a time, as many as the registers hold: a
// tile of 16 rows takes kParts of them.
constexpr int kCodeStreams = kParts <= 2 ? 4 : 1, kFloatStreams = kParts == 1 ? 4 : 1;
constexpr int kRows = 8 / kParts;

template <int bits, bool has_minimum, int group_size, bool as_codes>
void multiply(const QuantizedFormat& f, const uint8_t* blocks, const Activations& x, RowRange rows,
              int64_t tile, int64_t end, const TileFinish& finish) {
  auto run = [&]<int N, int M>(int64_t first, std::integral_constant<int, N>,
                               std::integral_constant<int, M>) {
    alignas(64) float results[N * M * kTileRows];
    const uint8_t* block = blocks + tile * f.tile_bytes();
    if constexpr (as_codes)
      tiles_times_codes<bits, has_minimum, group_size, N, M>(f, block, x, first, results);
    else
      tiles_times_floats<bits, has_minimum, group_size, N, M>(f, block, x, first, results);
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) finish(first + m, tile + n, results + (n * M + m) * kTileRows);
  };
  const std::integral_constant<int, 1> one;
  constexpr int streams = as_codes ? kCodeStreams : kFloatStreams;
  if (rows.end - rows.first == 1 && likes_many_streams())
    for (; tile + streams <= end; tile += streams)
      run(rows.first, std::integral_constant<int, streams>{}, one);
  for (; tile < end; ++tile) for_row_runs<kRows>(rows, [&](int64_t m, auto M) { run(m, one, M); });
}

// The first `columns` of a group of a tile: `count` elements of each, `stride` from one to the
// next.
template <int bits, class T>
void decode_group(const QuantizedFormat& f, const uint8_t* block, int64_t columns, int64_t count,
                  int64_t stride, T* out) {
  constexpr int mask = (1 << bits) - 1, lanes = kLanes<float>;
  Vec<float> scale[kParts], zero[kParts];
  load_halves(block + f.code_bytes(), scale);
  for (int i = 0; i < kParts; ++i) zero[i] = scale[i] * -float(f.zero());
  if (f.has_minimum) load_halves(block + f.code_bytes() + 2 * kTileRows, zero);
  for (int64_t column = 0; column < columns; block += 64) {
    I32 raw[kParts];
    load_bytes(block, raw);
#pragma GCC unroll 8
    for (int k = 0; k < 32 / bits; ++k, ++column, out += stride) {
      if (column == columns) return;
      const int shift = bits == 8 ? 8 * k : 8 * (k % 4) + k / 4 * 4;
      for (int i = 0; i < kParts; ++i) {
        const Vec<float> code = __builtin_convertvector(raw[i] >> shift & mask, Vec<float>);
        const int64_t left = count - i * lanes;
        if (left >= lanes)
          store(out + i * lanes, code * scale[i] + zero[i]);
        else if (left > 0)
          store_n(out + i * lanes, code * scale[i] + zero[i], left);
      }
    }
  }
}

}  // namespace

template <class T>
void decode_tiles(const QuantizedFormat& f, const uint8_t* blocks, int64_t begin, int64_t end,
                  int64_t in_features, int64_t out_features, T* out) {
  constexpr int64_t kSome = 8;  // tiles side by side, which fill whole cache lines of a column
  auto* decode = f.bits == 4 ? &decode_group<4, T> : &decode_group<8, T>;
  for (int64_t some = begin; some < end; some += kSome)
    for (int64_t g = 0; g < f.groups; ++g)
      for (int64_t tile = some; tile < std::min(end, some + kSome); ++tile) {
        const int64_t row = tile * kTileRows, column = g * f.group_size;
        decode(f, blocks + tile * f.tile_bytes() + g * f.block_bytes(),
               std::min(f.group_size, in_features - column),
               std::min(kTileRows, out_features - row), out_features,
               out + column * out_features + row);
      }
}
template void decode_tiles(const QuantizedFormat&, const uint8_t*, int64_t, int64_t, int64_t,
                           int64_t, bf16*);
template void decode_tiles(const QuantizedFormat&, const uint8_t*, int64_t, int64_t, int64_t,
                           int64_t, fp16*);

void ask_for_tiles(const QuantizedFormat& f, const uint8_t* blocks, int64_t begin, int64_t end) {
  const bool many = likes_many_streams();
  const int64_t tiles = many ? std::min<int64_t>(kCodeStreams, end - begin) : 1;
  const int64_t size = f.tile_bytes();
  const int64_t each =
      many ? std::min<int64_t>(1024, size) : std::min(kBytesAhead, (end - begin) * size);
  for (int64_t tile = begin; tile < begin + tiles; ++tile)
    for (int64_t at = 0; at < each; at += 64) __builtin_prefetch(blocks + tile * size + at, 0, 2);
}

void multiply_tiles(const QuantizedFormat& f, const uint8_t* blocks, const Activations& x,
                    RowRange rows, int64_t begin, int64_t end, const TileFinish& finish) {
  with_format(f, [&](auto bits, auto has_minimum, auto group_size) {
    auto* run = x.as_codes() ? &multiply<bits, has_minimum, group_size, true>
                             : &multiply<bits, has_minimum, group_size, false>;
    run(f, blocks, x, rows, begin, end, finish);
  });
}

}  // namespace aigc_fast

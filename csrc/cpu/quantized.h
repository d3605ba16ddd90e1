// Matrices of 4- or 8-bit codes times a few vectors: the arithmetic under quantized_linear.cpp.
//
// A weight (out_features, in_features) lies in tiles of 16 rows. A tile is a sequence of blocks,
// one a group of columns: the codes of the 16 rows, then their 16 scales, then (asymmetric
// weights) their 16 minimums, both fp16. So a tile is one stream of bytes, and a vector of int32
// lanes is 16 rows. Four columns of a row lie in one lane; 64 bytes of 4-bit codes hold the columns
// 0..3 of a run of 8 in their low nibbles and 4..7 in their high ones.
#pragma once

#include <algorithm>
#include <functional>

#include "tensor.h"

namespace aigc_fast {

constexpr int64_t kTileRows = 16;

struct QuantizedFormat {
  int64_t bits, groups, group_size;
  bool has_minimum;

  int64_t columns() const { return groups * group_size; }
  int64_t code_bytes() const { return kTileRows * group_size * bits / 8; }
  int64_t block_bytes() const { return code_bytes() + (has_minimum ? 4 : 2) * kTileRows; }
  int64_t tile_bytes() const { return groups * block_bytes(); }
  // The code of zero; where there is a minimum codes count from it.
  int zero() const { return has_minimum ? 0 : 1 << (bits - 1); }
};

// The format of a weight tensor (tiles, groups, bytes).
inline QuantizedFormat format_of(const Tensor& weight, int64_t bits, int64_t group_size,
                                 int64_t out_features) {
  require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  require(weight.dim() == 3 && weight.scalar_type() == ScalarType::Byte,
          "weight must be uint8 of 3 dimensions");
  const int64_t run = 32 / bits;
  require(group_size > 0 && group_size % run == 0 && group_size <= 65536,
          "group_size must be a multiple of ", run, " up to 65536, got ", group_size);
  QuantizedFormat f{bits, weight.size(1), group_size, true};
  f.has_minimum = weight.size(2) == f.block_bytes();
  require(weight.size(2) == f.block_bytes(), "weight must have ", f.block_bytes(), " or ",
          f.block_bytes() + 2 * kTileRows, " bytes a block, got ", weight.size(2));
  require(out_features > 0 && weight.size(0) == (out_features + kTileRows - 1) / kTileRows,
          "weight must have out_features / 16 tiles");
  return f;
}

// Rows of activations: as int8 codes, each group with its own scale, or as they are.
class Activations {
 public:
  explicit Activations(bool as_codes) : as_codes_(as_codes) {}

  void reset(const QuantizedFormat& f, int64_t rows) {
    format_ = f;
    sums_.resize(rows * f.groups);
    if (as_codes_) {
      codes_.resize(rows * f.columns());
      scales_.resize(rows * f.groups);
      starts_.resize(rows * f.groups);
    } else {
      floats_.resize(rows * f.columns());
    }
  }

  template <class T>
  void set(int64_t row, const T* x, int64_t size) {
    for (int64_t g = 0; g < format_.groups; ++g) {
      const int64_t begin = g * format_.group_size;
      const int64_t count = std::clamp<int64_t>(size - begin, 0, format_.group_size);
      as_codes_ ? set_codes(row, g, x + begin, count) : set_floats(row, g, x + begin, count);
    }
  }

  bool as_codes() const { return as_codes_; }
  const float* floats(int64_t row) const { return floats_.data() + row * format_.columns(); }
  const int8_t* codes(int64_t row) const { return codes_.data() + row * format_.columns(); }
  const float* scales(int64_t row) const { return scales_.data() + row * format_.groups; }
  // The sums of the groups.
  const float* sums(int64_t row) const { return sums_.data() + row * format_.groups; }
  // What a sum of products starts from, so that codes count from their zero.
  const int32_t* starts(int64_t row) const { return starts_.data() + row * format_.groups; }

 private:
  // code = round(x * 127 / max|x|).
  template <class T>
  void set_codes(int64_t row, int64_t g, const T* x, int64_t count) {
    int8_t* out = codes_.data() + row * format_.columns() + g * format_.group_size;
    Vec<float> top = {};
    for_vectors<float>(
        count, [&](int64_t i, auto n) { top = max<float>(top, abs<float>(load(x + i, n))); });
    float largest = 0;
    for (int i = 0; i < kLanes<float>; ++i) largest = std::max(largest, top[i]);
    const float factor = largest > 0 ? 127 / largest : 0.0f;
    Vec<int32_t> sums = {};
    for_vectors<float>(count, [&](int64_t i, auto n) {
      const Vec<int32_t> code = round_to_int(load(x + i, n) * factor);
      sums += code;
      store_codes(out + i, code, n);
    });
    std::fill(out + count, out + format_.group_size, 0);
    int32_t sum = 0;
    for (int i = 0; i < kLanes<float>; ++i) sum += sums[i];
    const int64_t at = row * format_.groups + g;
    scales_[at] = largest / 127;
    sums_[at] = scales_[at] * static_cast<float>(sum);
    starts_[at] = -format_.zero() * sum;
  }

  template <class T>
  void set_floats(int64_t row, int64_t g, const T* x, int64_t count) {
    float* out = floats_.data() + row * format_.columns() + g * format_.group_size;
    Vec<float> sum = {};
    for_vectors<float>(count, [&](int64_t i, auto n) {
      const Vec<float> v = load(x + i, n);
      sum += v;
      store(out + i, v, n);
    });
    std::fill(out + count, out + format_.group_size, 0.0f);
    sums_[row * format_.groups + g] = sum_lanes<float>(sum);
  }

  // To the nearest, ties to even.
  static Vec<int32_t> round_to_int(Vec<float> v) {
#if defined(__AVX512F__)
    return (Vec<int32_t>)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (Vec<int32_t>)_mm256_cvtps_epi32((__m256)v);
#else
    Vec<int32_t> codes;
    for (int i = 0; i < kLanes<float>; ++i) codes[i] = static_cast<int32_t>(std::nearbyint(v[i]));
    return codes;
#endif
  }

  template <class N>
  static void store_codes(int8_t* p, Vec<int32_t> code, N n) {
#if defined(__AVX512F__)
    if constexpr (!std::is_same_v<N, int>) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)code));
      return;
    }
#endif
    for (int i = 0; i < static_cast<int>(n); ++i) p[i] = static_cast<int8_t>(code[i]);
  }

  bool as_codes_;
  QuantizedFormat format_{};
  std::vector<int8_t> codes_;
  std::vector<float> floats_, scales_, sums_;
  std::vector<int32_t> starts_;
};

// ---- one tile -----------------------------------------------------------------------------------

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
        // Four streams, and what comes after them asked for early: 16 GB/s a core, from memory and
        // the last-level cache alike, where one stream asking 2 KB ahead got 12.
        __builtin_prefetch(p + N * tile_bytes, 0, 2);
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
      __builtin_prefetch(p + N * tile_bytes, 0, 2);
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

// The same for activations as they are. Codes count from the middle of their range, so that no
// large terms cancel.
template <int bits, bool has_minimum, int group_size, int N, int M>
void tiles_times_floats(const QuantizedFormat& f, const uint8_t* block,
                        const Activations& activations, int64_t first, float* out) {
  constexpr int middle = 1 << (bits - 1), mask = (1 << bits) - 1;
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
        __builtin_prefetch(p + N * tile_bytes, 0, 2);
#pragma GCC unroll 8
        for (int k = 0; k < 32 / bits; ++k) {
          const int shift = bits == 8 ? 8 * k : 8 * (k % 4) + k / 4 * 4;
#pragma GCC unroll 4
          for (int i = 0; i < kParts; ++i) {
            const Vec<float> w =
                __builtin_convertvector(((raw[i] >> shift) & mask) - middle, Vec<float>);
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
AIGC_INLINE void for_row_runs(int64_t rows, F&& f, int64_t first = 0) {
  for (; first + M <= rows; first += M) f(first, std::integral_constant<int, M>{});
  if constexpr (M > 1) for_row_runs<M / 2>(rows, f, first);
}

// Takes the 16 outputs of one row: finish(row, tile, outputs).
using Finish = std::function<void(int64_t, int64_t, const float*)>;

// The products of the tiles [begin, end) with all rows. A tile is read from memory once for all of
// them. (Not a template: the forty kernels would be compiled for each of a hundred callers.)
inline void multiply_tiles(const QuantizedFormat& f, const uint8_t* blocks, const Activations& x,
                           int64_t rows, int64_t begin, int64_t end, const Finish& finish) {
  with_format(f, [&](auto bits, auto has_minimum, auto group_size) {
    auto run = [&]<int N, int M>(int64_t tile, int64_t first, std::integral_constant<int, N>,
                                 std::integral_constant<int, M>) {
      alignas(64) float results[N * M * kTileRows];
      const uint8_t* block = blocks + tile * f.tile_bytes();
      if (x.as_codes())
        tiles_times_codes<bits, has_minimum, group_size, N, M>(f, block, x, first, results);
      else
        tiles_times_floats<bits, has_minimum, group_size, N, M>(f, block, x, first, results);
      for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) finish(first + m, tile + n, results + (n * M + m) * kTileRows);
    };
    const std::integral_constant<int, 1> one;
    int64_t tile = begin;
    if (rows == 1)
      for (; tile + 4 <= end; tile += 4) run(tile, 0, std::integral_constant<int, 4>{}, one);
    for (; tile < end; ++tile)
      for_row_runs<8>(rows, [&](int64_t first, auto m) { run(tile, first, one, m); });
  });
}

}  // namespace aigc_fast

// Matrices of 4- or 8-bit codes times a few vectors: the activations, the product.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>

#include "tensor.h"

#include <aigc_fast/quantized_format.h>

namespace aigc_fast {

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
  // code = round(x * 127 / max|x|). The scale of a group with NaN or inf is that, its codes are 0,
  // and its products NaN.
  template <class T>
  void set_codes(int64_t row, int64_t g, const T* x, int64_t count) {
    int8_t* out = codes_.data() + row * format_.columns() + g * format_.group_size;
    // As integers magnitudes have the same order, and NaN is the largest.
    Vec<int32_t> top = {};
    for_vectors<float>(count, [&](int64_t i, auto n) {
      const Vec<int32_t> magnitude = (Vec<int32_t>)load(x + i, n) & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    });
    const float largest = std::bit_cast<float>(max_lanes(top));
    const bool finite = largest <= std::numeric_limits<float>::max();
    // Of smaller numbers 127 / largest is infinite: their codes are 0.
    const float factor = largest > 3.7323e-37f && finite ? 127 / largest : 0.0f;
    Vec<int32_t> sums = {};
    for_vectors<float>(count, [&](int64_t i, auto n) {
      const Vec<int32_t> code = round_to_int(finite ? load(x + i, n) * factor : Vec<float>{});
      sums += code;
      store_codes(out + i, code, n);
    });
    std::fill(out + count, out + format_.group_size, 0);
    const int32_t sum = sum_lanes<int32_t>(sums);
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

  static int32_t max_lanes(Vec<int32_t> v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t top = v[0];
    for (int i = 1; i < kLanes<float>; ++i) top = std::max(top, v[i]);
    return top;
#endif
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

// Takes the 16 outputs of one row: finish(row, tile, outputs).
using TileFinish = std::function<void(int64_t, int64_t, const float*)>;

// Some rows of activations.
struct RowRange {
  int64_t first, end;
};

// The products of the tiles [begin, end) with these rows. A tile is read from memory once for all
// of them. (quantized_tiles.cpp; no template, or its kernels would be compiled for every caller.)
void multiply_tiles(const QuantizedFormat& f, const uint8_t* blocks, const Activations& x,
                    RowRange rows, int64_t begin, int64_t end, const TileFinish& finish);

// Asks memory for what that will read first.
void ask_for_tiles(const QuantizedFormat& f, const uint8_t* blocks, int64_t begin, int64_t end);

// The tiles [begin, end) as the columns of a matrix (in_features, out_features) of bf16 or fp16.
template <class T>
void decode_tiles(const QuantizedFormat& f, const uint8_t* blocks, int64_t begin, int64_t end,
                  int64_t in_features, int64_t out_features, T* out);

}  // namespace aigc_fast

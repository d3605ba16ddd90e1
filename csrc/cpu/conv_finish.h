// What a convolution is made of: its sizes and weights, and what becomes of its sums.
#pragma once

#include <array>

#include "bf16_dot.h"
#include "channels.h"
#include "copy_transposed.h"
#include "kept_buffer.h"

namespace aigc_fast {

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct ConvSize {
  int64_t in, out, taps;
};

template <class T>
struct ConvWeight {
  const T* data;
  int64_t out_stride, in_stride, tap_stride;

  AIGC_INLINE const T* at(int64_t o, int64_t c, int64_t tap) const {
    return data + o * out_stride + c * in_stride + tap * tap_stride;
  }
};

template <class S, class T>
AIGC_INLINE void copy_channels(S* to, const T* from, int64_t n) {
  if constexpr (std::is_same_v<S, T>)
    std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
  else
    convert(from, n, to);
}

// to[(i * taps + tap) * kOuts + o]: the weights of `inputs` inputs from c and n outputs from
// `first`, zero beyond the last.
template <int64_t kOuts, class S, class T>
void gather_outputs(const ConvWeight<T>& weight, int64_t taps, int64_t first, int64_t n, int64_t c,
                    int64_t inputs, S* to) {
  if (n < kOuts) std::memset(static_cast<void*>(to), 0, inputs * taps * kOuts * sizeof(S));
  if (weight.tap_stride == 1 && weight.in_stride == taps) {
    copy_transposed(weight.at(first, c, 0), weight.out_stride, inputs * taps, n, to, kOuts);
  } else if (weight.in_stride == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      copy_transposed(weight.at(first, c, tap), weight.out_stride, inputs, n, to + tap * kOuts,
                      taps * kOuts);
  } else if (weight.out_stride == 1) {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        copy_channels(to + (i * taps + tap) * kOuts, weight.at(first, c + i, tap), n);
  } else if (weight.tap_stride == 1) {
    for (int64_t i = 0; i < inputs; ++i)
      copy_transposed(weight.at(first, c + i, 0), weight.out_stride, taps, n, to + i * taps * kOuts,
                      kOuts);
  } else {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t o = 0; o < n; ++o)
          copy_one(to + (i * taps + tap) * kOuts + o, weight.at(first + o, c + i, tap));
  }
}

// to[i * kStep + row] = rows[row][i]
template <int64_t kOuts, int64_t kStep, class S>
AIGC_INLINE void interleave_rows(const S* const (&rows)[kStep], S* to) {
  if constexpr (kStep == 1) {
    std::memcpy(static_cast<void*>(to), rows[0], kOuts * sizeof(S));
  } else {
    static_assert(kStep == 2 && sizeof(S) == 2);
    for (int64_t o = 0; o < kOuts; ++o) {
      uint16_t low, high;
      std::memcpy(&low, rows[0] + o, 2);
      std::memcpy(&high, rows[1] + o, 2);
      const uint32_t both = uint32_t(high) << 16 | low;
      std::memcpy(static_cast<void*>(to + 2 * o), &both, 4);
    }
  }
}

// The weights of outputs first, ..., first + n - 1, to [tap][input / kStep][kOuts][input % kStep],
// zero beyond the last output and input.
template <int64_t kOuts, int64_t kStep, class S, class T>
void pack_outputs(const ConvWeight<T>& weight, const ConvSize& size, int64_t first, int64_t n,
                  int64_t depth, S* to) {
  if (size.taps == 0) return;  // outputs between the taps of a transposed convolution
  constexpr int64_t kInputs = 16;
  const int64_t row = size.taps * kOuts;
  std::vector<S> some(kInputs * row);  // [input][tap][kOuts]
  for (int64_t c = 0; c < size.in; c += kInputs) {
    const int64_t inputs = std::min(kInputs, size.in - c);
    gather_outputs<kOuts>(weight, size.taps, first, n, c, inputs, some.data());
    if (inputs % kStep) std::memset(static_cast<void*>(&some[inputs * row]), 0, row * sizeof(S));
    for (int64_t tap = 0; tap < size.taps; ++tap)
      for (int64_t i = 0; i < inputs; i += kStep) {
        const S* rows[kStep];
        for (int64_t j = 0; j < kStep; ++j) rows[j] = &some[(i + j) * row + tap * kOuts];
        interleave_rows<kOuts, kStep>(rows, to + (tap * depth + c + i) * kOuts);
      }
  }
  if (const int64_t filled = round_up(size.in, kStep); filled < depth)
    for (int64_t tap = 0; tap < size.taps; ++tap)
      std::memset(static_cast<void*>(to + (tap * depth + filled) * kOuts), 0,
                  (depth - filled) * kOuts * sizeof(S));
}

constexpr int kConvResiduals = 3;

// Where the outputs of neighbouring pixels go, `pitch` apart, and what is added to them: as many
// tensors of the same memory order as are not null. Where `gate`, another such tensor, is not
// positive, outputs are multiplied by a slope: the derivative of a leaky ReLU of it.
template <class T>
struct ConvTarget {
  T* y;
  int64_t pitch;
  std::array<const T*, kConvResiduals> residuals = {};
  const T* gate = nullptr;

  AIGC_INLINE ConvTarget at(int64_t pixel) const {
    ConvTarget moved = *this;
    moved.y += pixel * pitch;
    for (const T*& residual : moved.residuals)
      if (residual) residual += pixel * pitch;
    if (gate) moved.gate += pixel * pitch;
    return moved;
  }
};

// y = total_gain * (gain * prelu(sum + bias) + residuals), and where the gate is not positive
// gate_slope times that; bias and slope are padded to whole vectors.
template <class T>
struct ConvFinish {
  using A = Acc<T>;
  const A *bias, *slope;
  A gain, total_gain;
  int64_t out;
  A gate_slope = 1;

  // Outputs o, o + 1, ... of n pixels, whose sums lie `pitch` apart.
  AIGC_INLINE void write(const ConvTarget<T>& to, int64_t n, int64_t o, const A* sums,
                         int64_t pitch) const {
    const int64_t lanes = std::min<int64_t>(out - o, kLanes<A>);
    if (lanes == kLanes<A>) {
      finished(
          to, n, o, sums, pitch, [](const T* from) { return load(from); },
          [](T* at, Vec<A> v) { store(at, v); });
    } else if (lanes > 0) {
      finished(
          to, n, o, sums, pitch, [&](const T* from) { return load_n(from, lanes); },
          [&](T* at, Vec<A> v) { store_n(at, v, lanes); });
    }
  }

  // Calls put with the address and the values of each pixel.
  template <class Get, class Put>
  AIGC_INLINE void finished(const ConvTarget<T>& to, int64_t n, int64_t o, const A* sums,
                            int64_t pitch, Get&& get, Put&& put) const {
    const Vec<A> offset = load(bias + o), below = load(slope + o);
    const auto [first, second, third] = to.residuals;
    for (int64_t p = 0; p < n; ++p) {
      const int64_t at = p * to.pitch + o;
      const Vec<A> sum = load(sums + p * pitch) + offset;
      Vec<A> v = (sum > 0 ? sum : sum * below) * gain;
      if (first) v += get(first + at);
      if (second) v += get(second + at);
      if (third) v += get(third + at);
      v *= total_gain;
      if (to.gate) v = get(to.gate + at) > 0 ? v : v * gate_slope;
      put(to.y + at, v);
    }
  }
};

#if AIGC_BF16_DOT
// The same for 16 outputs in bf16. One instruction rounds them, which takes `store` ten.
__attribute__((target("avx512bf16"), noinline)) inline void write_rounded(
    const ConvFinish<bf16>& finish, const ConvTarget<bf16>& to, int64_t n, int64_t o,
    const float* sums, int64_t pitch) {
  finish.finished(
      to, n, o, sums, pitch, [](const bf16* from) { return load(from); },
      [](bf16* at, Vec<float> v) __attribute__((target("avx512bf16"))) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(static_cast<void*>(at), &rounded, sizeof rounded);
      });
}
#endif

// `values`, or `missing` for every channel, padded to whole vectors of any width.
template <class T>
std::vector<Acc<T>> padded_channels(const MaybeTensor& values, const char* name, int64_t out,
                                    Acc<T> missing) {
  std::vector<Acc<T>> result(out + 2 * kLanes<Acc<T>>, missing);
  channel_values(values, out, name, missing, result.data());
  return result;
}

}  // namespace aigc_fast

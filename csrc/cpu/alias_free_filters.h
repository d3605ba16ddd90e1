// Filters of 12 taps up and down by 2, on tiles of samples in the cache: both directions of
// alias_free_snake.
//
// A tile is some samples of one channel or, where channels are innermost in memory, of several side
// by side: there a sample lies `width` elements from the one before it, and a vector holds whatever
// `kLanes` neighbours in memory are.
//
// The upsampled signal is kept as its two phases, the even and the odd samples. With x continued
// beyond its ends by its first and last value,
//   even[s] = sum 2 up[5 - 2d] x[s + d], d = -3..2;   odd[s] = sum 2 up[6 - 2d] x[s + d], d = -2..3
//   y[t] = sum down[2d + 5] even[t + d], d = -2..3,  + sum down[2d + 6] odd[t + d], d = -3..2
// where even and odd hold snake's values, continued by even[0] and odd[time - 1]. The adjoint of
// either line is the other one, with its taps; that of continuing a signal is to add what lies
// beyond an end to the sample there.
#pragma once

#include "aligned_buffer.h"
#include "tensor.h"

namespace aigc_fast {

constexpr int kTaps = 12, kReach = 3;  // a sample reads others at most kReach away
// The distance of a channel's samples where they are neighbours: known to the compiler.
using One = std::integral_constant<int64_t, 1>;

template <class A>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
struct Phases {
  Vec<A> even, odd;
};

// From the far taps, which are the small ones, to the near: so the sums round least.
constexpr int kOrder[] = {3, -3, 2, -2, 1, -1, 0};

// even[s] and odd[s] of samples x around `in`; taps are up, with its factor of 2.
template <class A, class Width = One>
AIGC_INLINE Phases<A> to_phases(const A* taps, const A* in, Width width = {}) {
  Phases<A> sum = {};
#pragma GCC unroll 7
  for (const int d : kOrder) {
    const Vec<A> v = load(in + d * width);
    if (d < kReach) sum.even += v * taps[5 - 2 * d];
    if (d > -kReach) sum.odd += v * taps[6 - 2 * d];
  }
  return sum;
}

// y[t] of the phases around `even` and `odd`; taps are down.
template <class A, class Width = One>
AIGC_INLINE Vec<A> from_phases(const A* taps, const A* even, const A* odd, Width width = {}) {
  Vec<A> a = {}, b = {};
#pragma GCC unroll 7
  for (const int d : kOrder) {
    if (d > -kReach) a += load(even + d * width) * taps[2 * d + 5];
    if (d < kReach) b += load(odd + d * width) * taps[2 * d + 6];
  }
  return a + b;
}

// Samples [first, first + size) of `time`, of `width` channels side by side; in the tensor a sample
// lies `stride` elements from the one before it.
struct SequenceTile {
  int64_t time, first, size, width, stride;

  bool at_start() const { return first == 0; }
  bool at_end() const { return first + size == time; }

  // f(place in the tensor, place in the line, elements) for what samples [begin, end) are in both.
  template <class F>
  AIGC_INLINE void for_runs(int64_t begin, int64_t end, F&& f) const {
    const int64_t rows = width == stride ? end - begin : 1;  // that are one run
    for (int64_t s = begin; s < end; s += rows) f(s * stride, (s - first) * width, rows * width);
  }
};

// From a tensor's dtype to that of computing, or back.
template <class From, class To>
AIGC_INLINE void copy_as(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<To, Acc<From>> || std::is_same_v<From, Acc<To>>)
    convert(from, n, to);
  else
    std::copy_n(from, n, to);
}

// A tile's samples with a margin, in the dtype of computing; element 0 is the tile's first.
template <class A>
class SequenceLine {
 public:
  // Room for a tile of so many elements, of any width up to this.
  SequenceLine(int64_t elements, int64_t width)
      : before_(whole_vectors<A>(margin(width) * width)), memory_(elements + 2 * before_) {}
  operator A*() { return memory_.data() + before_; }

  // A tile's samples and the margins; beyond the sequence's ends the samples there, or zeros.
  template <class T>
  void fill(const T* from, const SequenceTile& t, bool zeros) {
    const int64_t around = margin(t.width), last = t.first + t.size + around;
    const int64_t begin = std::max<int64_t>(0, t.first - around), end = std::min(t.time, last);
    A* line = *this;
    t.for_runs(begin, end,
               [&](int64_t place, int64_t at, int64_t n) { copy_as(from + place, n, line + at); });
    const auto beyond = [&](int64_t sample, int64_t nearest) {
      A* to = line + (sample - t.first) * t.width;
      if (zeros) return std::fill_n(to, t.width, A(0)), void();
      std::copy_n(line + (nearest - t.first) * t.width, t.width, to);
    };
    for (int64_t s = t.first - around; s < begin; ++s) beyond(s, 0);
    for (int64_t s = end; s < last; ++s) beyond(s, t.time - 1);
  }

 private:
  // Samples on either side that hold what two filters read, and whole vectors.
  static int64_t margin(int64_t width) { return 2 * kReach + (kLanes<A> + width - 1) / width; }

  int64_t before_;
  AlignedBuffer<A> memory_;
};

}  // namespace aigc_fast

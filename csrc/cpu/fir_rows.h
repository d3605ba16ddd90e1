// FIR filters with zero-insertion before and decimation after, on the rows of a plane.
//
// Output pixel o reads input pixel i through tap k where i up = o down + k - pad: zeros that `up`
// inserts are never multiplied. Along a row, outputs of one phase (o mod P, with P = up / gcd(up,
// down)) share their taps and read inputs `step` = down / gcd apart: rows are kept padded with
// zeros and split by that step, so that every load is of neighbours.
#pragma once

#include <algorithm>
#include <numeric>

#include "tensor.h"

namespace aigc_fast {

// One direction.
struct Axis {
  int64_t up, down, pad, taps, in, out;

  // The input that output o reads through tap k; false where that is an inserted zero.
  bool source(int64_t o, int64_t k, int64_t* i) const {
    const int64_t at = o * down + k - pad;
    *i = (at - (at % up + up) % up) / up;
    return *i * up == at;
  }
};

// An axis with `before` and `after` zeros at its ends; refuses a filter that does not fit.
inline Axis axis_of(int64_t up, int64_t down, int64_t before, int64_t after, int64_t taps,
                    int64_t in) {
  require(up >= 1 && down >= 1, "up and down must be at least 1");
  const int64_t last = in * up + before + after - taps;
  require(last >= 0, "filter must not be larger than the padded image");
  return {up, down, before, taps, in, last / down + 1};
}

// A filter of both directions, times gain.
template <class A>
struct Fir {
  Axis y, x;
  bool separable;
  std::vector<A> taps;      // [height][width] as correlated, or those of both directions
  std::vector<A> vertical;  // separable: the taps times gain

  Fir(const Axis& y, const Axis& x, const Tensor& filter, bool flip, double gain)
      : y(y), x(x), separable(filter.dim() == 1), taps(filter.numel()) {
    const Tensor dense = as_contiguous(filter);
    dispatch(dense, "filter", [&]<class F>(F) {
      for (int64_t i = 0; i < filter.numel(); ++i)
        taps[i] = static_cast<A>(load_n(data<F>(dense) + i, 1)[0]);
    });
    if (!flip) std::reverse(taps.begin(), taps.end());
    if (separable) vertical = taps;
    for (A& tap : separable ? vertical : taps) tap = static_cast<A>(tap * gain);
  }

  A weight(int64_t ky, int64_t kx) const { return taps[ky * x.taps + kx]; }
};

inline void check_filter(const Tensor& filter, const char* name) {
  require(filter.numel() > 0 && (filter.dim() == 1 || filter.dim() == 2), name,
          " must have shape (height, width) or (taps,)");
}

template <class T, class A>
struct Tap {
  const T* from;
  A weight;
};

// The rows that output row o reads, as (tap, input row).
struct RowTap {
  int64_t tap, row;
};
inline void row_taps(const Axis& y, int64_t o, std::vector<RowTap>* found) {
  found->clear();
  // Every up-th tap meets a pixel, the first such is k; divisions are slow.
  const int64_t at = o * y.down - y.pad, beyond = (at % y.up + y.up) % y.up;
  int64_t k = beyond ? y.up - beyond : 0;
  for (int64_t i = (at + k) / y.up; k < y.taps; k += y.up, ++i)
    if (i >= 0 && i < y.in) found->push_back({k, i});
}

template <int N, class A>
AIGC_INLINE void sum_batch(const std::vector<Tap<A, A>>& taps, int64_t i, A* to) {
  constexpr int lanes = kLanes<A>;
  const size_t half = taps.size() / 2;
  Vec<A> a[N] = {}, b[N] = {};
  for (size_t t = 0; t < half; ++t) {
    const Tap<A, A> p = taps[t], q = taps[half + t];
#pragma GCC unroll 4  // else the sums stay in memory; so below
    for (int k = 0; k < N; ++k) {
      a[k] += load(p.from + i + k * lanes) * p.weight;
      b[k] += load(q.from + i + k * lanes) * q.weight;
    }
  }
  if (taps.size() % 2) {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) a[k] += load(taps.back().from + i + k * lanes) * taps.back().weight;
  }
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) store(to + i + k * lanes, a[k] + b[k]);
}

// to[i] = sum over taps of from[i] * weight, in whole vectors up to `size`; in two chains of
// additions, which round less than one.
template <class A>
void sum_taps(const std::vector<Tap<A, A>>& taps, int64_t size, A* to) {
  constexpr int lanes = kLanes<A>, kBatch = 4;  // of vectors whose sums do not wait for another
  int64_t i = 0;
  for (; i + kBatch * lanes <= size; i += kBatch * lanes) sum_batch<kBatch>(taps, i, to);
  for (; i < size; i += lanes) sum_batch<1>(taps, i, to);
}

// Lanes a0 b0 a1 b1 ... (half 0) or those from the middle on (half 1).
template <class A>
AIGC_INLINE Vec<A> zip(Vec<A> a, Vec<A> b, int half) {
  constexpr int lanes = kLanes<A>;
  Vec<Bits<A>> order;
  for (int k = 0; k < lanes; ++k) order[k] = half * lanes / 2 + k / 2 + k % 2 * lanes;
  return __builtin_shuffle(a, b, order);
}

// Every second lane of a, then of b, from lane `first`.
template <class A>
AIGC_INLINE Vec<A> every_second(Vec<A> a, Vec<A> b, int first) {
  Vec<Bits<A>> order;
  for (int k = 0; k < kLanes<A>; ++k) order[k] = 2 * k + first;
  return __builtin_shuffle(a, b, order);
}

// The rows of a filtered plane, in increasing order; input rows are asked for as they are needed.
template <class A>
class RowFilter {
 public:
  explicit RowFilter(const Fir<A>& fir)
      : fir_(fir),
        phases_(fir.x.up / std::gcd(fir.x.up, fir.x.down)),
        step_(fir.x.down / std::gcd(fir.x.up, fir.x.down)),
        columns_((fir.x.out + phases_ - 1) / phases_),
        stride_((columns_ + kAll) / kAll * kAll + kAll),
        ring_((fir.y.taps - 1) / fir.y.up + 2) {
    const Axis& x = fir.x;
    int64_t highest;
    x.source(0, 0, &lowest_);
    x.source(x.out - 1 + phases_, x.taps - 1, &highest);
    length_ = ((highest - lowest_) / step_ + 2 * kAll) / kAll * kAll + kAll;
    begin_ = std::max<int64_t>(0, lowest_);
    end_ = std::max(begin_, std::min(x.in, highest + 1));
    lines_.resize(ring_ * step_ * length_);
    mixed_.resize(fir.separable ? step_ * length_ : 0);
    row_.resize(step_ > 1 ? step_ * length_ : 0);
    result_.resize(phases_ * stride_);
    natural_.resize(phases_ > 1 ? phases_ * stride_ : 0);
    // Which element of a line the outputs of a phase start from; found once, divisions are slow.
    plan_.resize(phases_), across_.resize(phases_);
    for (int64_t p = 0; p < phases_ && p < x.out; ++p)
      for (int64_t k = 0; k < x.taps; ++k) {
        int64_t i;
        if (!x.source(p, k, &i)) continue;
        const int64_t at = (i - lowest_) % step_ * length_ + (i - lowest_) / step_;
        plan_[p].push_back({k, at});
        if (fir.separable) across_[p].push_back({mixed_.data() + at, fir.taps[k]});
      }
  }

  RowFilter(const RowFilter&) = delete;  // taps point into it

  // Before the first row of another plane, or an earlier row.
  void restart() { filled_ = 0; }

  // Row o, of at least x.out elements and then some to the end of a vector. read(i, begin, end, to)
  // puts elements [begin, end) of input row i at to + begin.
  template <class Read>
  const A* row(int64_t o, Read&& read) {
    row_taps(fir_.y, o, &rows_);
    for (const RowTap& r : rows_)
      if (r.row >= filled_) fill(r.row, read), filled_ = r.row + 1;
    if (fir_.separable) {
      taps_.resize(rows_.size());
      for (size_t r = 0; r < rows_.size(); ++r)
        taps_[r] = {line(rows_[r].row), fir_.vertical[rows_[r].tap]};
      sum_taps(taps_, step_ * length_, mixed_.data());
    }
    for (int64_t p = 0; p < phases_; ++p) {
      A* to = result_.data() + p * stride_;
      if (fir_.separable) {
        sum_taps(across_[p], columns_, to);
        continue;
      }
      taps_.resize(plan_[p].size() * rows_.size());
      auto tap = taps_.begin();
      for (const PhaseTap& t : plan_[p])
        for (const RowTap& r : rows_) *tap++ = {line(r.row) + t.at, fir_.weight(r.tap, t.tap)};
      sum_taps(taps_, columns_, to);
    }
    return phases_ == 1 ? result_.data() : interleaved();
  }

 private:
  static constexpr int64_t kAll = kLanes<A>;
  struct PhaseTap {
    int64_t tap, at;
  };

  A* line(int64_t i) { return lines_.data() + i % ring_ * step_ * length_; }

  template <class Read>
  void fill(int64_t i, Read& read) {
    A* to = line(i);
    if (step_ == 1) return read(i, begin_, end_, to - lowest_);
    read(i, begin_, end_, row_.data() - lowest_);
    if (step_ == 2) {
      for (int64_t e = 0; e < length_; e += kAll) {
        const Vec<A> a = load(row_.data() + 2 * e), b = load(row_.data() + 2 * e + kAll);
        store(to + e, every_second<A>(a, b, 0));
        store(to + length_ + e, every_second<A>(a, b, 1));
      }
      return;
    }
    for (int64_t q = 0; q < step_; ++q)
      for (int64_t e = 0; e < length_; ++e) to[q * length_ + e] = row_[q + step_ * e];
  }

  // The phases' results in the order of the row.
  const A* interleaved() {
    const A* from = result_.data();
    A* to = natural_.data();
    if (phases_ == 2) {
      for (int64_t m = 0; m < columns_; m += kAll) {
        const Vec<A> a = load(from + m), b = load(from + stride_ + m);
        for (int half = 0; half < 2; ++half) store(to + 2 * m + half * kAll, zip<A>(a, b, half));
      }
    } else if (phases_ == 4) {
      for (int64_t m = 0; m < columns_; m += kAll) {
        Vec<A> v[4];
        for (int p = 0; p < 4; ++p) v[p] = load(from + p * stride_ + m);
        for (int half = 0; half < 2; ++half) {
          const Vec<A> even = zip<A>(v[0], v[2], half), odd = zip<A>(v[1], v[3], half);
          store(to + 4 * m + 2 * half * kAll, zip<A>(even, odd, 0));
          store(to + 4 * m + (2 * half + 1) * kAll, zip<A>(even, odd, 1));
        }
      }
    } else {
      for (int64_t p = 0; p < phases_; ++p)
        for (int64_t m = 0; m < columns_; ++m) to[m * phases_ + p] = from[p * stride_ + m];
    }
    return to;
  }

  const Fir<A>& fir_;
  int64_t phases_, step_, columns_, stride_, ring_, lowest_, length_, begin_, end_, filled_ = 0;
  std::vector<A> lines_, mixed_, row_, result_, natural_;
  std::vector<std::vector<PhaseTap>> plan_;
  std::vector<RowTap> rows_;
  std::vector<Tap<A, A>> taps_;
  std::vector<std::vector<Tap<A, A>>> across_;  // separable: the taps of each phase
};

}  // namespace aigc_fast

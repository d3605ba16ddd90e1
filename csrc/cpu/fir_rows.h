// FIR filters (fir.h) on the rows of a plane.
//
// Along a row, outputs of one phase (o mod P, with P = up / gcd(up, down)) share their taps and
// read inputs `step` = down / gcd apart: rows are kept padded with zeros and split by that step, so
// that every load is of neighbours.
#pragma once

#include <numeric>

#include "fir.h"

namespace aigc_fast {

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
  for (; i + (kBatch - 1) * lanes < size; i += kBatch * lanes) sum_batch<kBatch>(taps, i, to);
  const int64_t left = (size - i + lanes - 1) / lanes;
  if (left == 3) sum_batch<3>(taps, i, to);
  if (left == 2) sum_batch<2>(taps, i, to);
  if (left == 1) sum_batch<1>(taps, i, to);
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

// Zeros that begin at a multiple of a vector: one that spans two lines of the cache takes twice as
// long to load.
template <class A>
class Vectors {
 public:
  void resize(int64_t elements) { memory_.resize((elements + kLanes<A> - 1) / kLanes<A>); }
  A* data() { return reinterpret_cast<A*>(memory_.data()); }

 private:
  struct One {
    Vec<A> zeros = {};
  };
  std::vector<One> memory_;
};

// The rows of a filtered plane, in increasing order; input rows are asked for as they are needed.
//
// A separable filter goes down the columns first, so that a row of the result is filtered along
// once, but along the rows first where it makes several of each: then every row that is read is
// filtered along, and kept so.
template <class A>
class RowFilter {
 public:
  explicit RowFilter(const Fir<A>& fir)
      : fir_(fir),
        phases_(fir.x.up / std::gcd(fir.x.up, fir.x.down)),
        step_(fir.x.down / std::gcd(fir.x.up, fir.x.down)),
        columns_((fir.x.out + phases_ - 1) / phases_),
        stride_((columns_ + kAll - 1) / kAll * kAll),
        ring_((fir.y.taps - 1) / fir.y.up + 2),
        along_first_(fir.separable && fir.y.up > fir.y.down) {
    const Axis& x = fir.x;
    int64_t highest;
    x.source(0, 0, &lowest_);
    x.source(x.out - 1 + phases_, x.taps - 1, &highest);
    length_ = ((highest - lowest_) / step_ + kAll) / kAll * kAll;
    begin_ = std::max<int64_t>(0, lowest_);
    end_ = std::max(begin_, std::min(x.in, highest + 1));
    const int64_t split = step_ * length_ + kAll;  // taps read on beyond the last line's end
    line_ = along_first_ ? phases_ * stride_ : split;
    lines_.resize(ring_ * line_);
    if (fir.separable) mixed_.resize(split);
    if (step_ > 1) row_.resize(split);
    if (phases_ > 1) result_.resize(phases_ * stride_);
    natural_.resize(phases_ * stride_);
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

  // Row o, of at least x.out elements and then some to the end of a vector; the caller may change
  // it. read(i, begin, end, to) puts elements [begin, end) of input row i at to + begin.
  template <class Read>
  A* row(int64_t o, Read&& read) {
    row_taps(fir_.y, o, &rows_);
    for (const RowTap& r : rows_)
      if (r.row >= filled_) fill(r.row, read), filled_ = r.row + 1;
    taps_.resize(rows_.size());
    // The rows are neighbours; a division for each would take as long as its sum.
    int64_t place = rows_.empty() ? 0 : rows_[0].row % ring_;
    for (size_t r = 0; r < rows_.size(); ++r) {
      taps_[r] = {lines_.data() + place * line_,
                  fir_.separable ? fir_.vertical[rows_[r].tap] : A(0)};
      if (++place == ring_) place = 0;
    }
    if (along_first_) {
      sum_taps(taps_, fir_.x.out, natural_.data());
    } else if (fir_.separable) {
      sum_taps(taps_, step_ * length_, mixed_.data());
      along(natural_.data());
    } else {
      by_phase(natural_.data(), [&](int64_t p, A* to) {
        all_taps_.resize(plan_[p].size() * rows_.size());
        auto tap = all_taps_.begin();
        for (const PhaseTap& t : plan_[p])
          for (size_t r = 0; r < rows_.size(); ++r)
            *tap++ = {taps_[r].from + t.at, fir_.weight(rows_[r].tap, t.tap)};
        sum_taps(all_taps_, columns_, to);
      });
    }
    return natural_.data();
  }

 private:
  static constexpr int64_t kAll = kLanes<A>;
  struct PhaseTap {
    int64_t tap, at;
  };

  template <class Read>
  void fill(int64_t i, Read& read) {
    A* to = lines_.data() + i % ring_ * line_;
    split(i, read, along_first_ ? mixed_.data() : to);
    if (along_first_) along(to);
  }

  // Input row i between zeros, every step-th element beside the other.
  template <class Read>
  void split(int64_t i, Read& read, A* to) {
    if (step_ == 1) return read(i, begin_, end_, to - lowest_);
    A* row = row_.data();
    read(i, begin_, end_, row - lowest_);
    if (step_ == 2) {
      for (int64_t e = 0; e < length_; e += kAll) {
        const Vec<A> a = load(row + 2 * e), b = load(row + 2 * e + kAll);
        store(to + e, every_second<A>(a, b, 0));
        store(to + length_ + e, every_second<A>(a, b, 1));
      }
      return;
    }
    for (int64_t q = 0; q < step_; ++q)
      for (int64_t e = 0; e < length_; ++e) to[q * length_ + e] = row[q + step_ * e];
  }

  // A row of the result from the split row in mixed_.
  void along(A* to) {
    by_phase(to, [&](int64_t p, A* out) { sum_taps(across_[p], columns_, out); });
  }

  // sums(p, to) makes the outputs of phase p; they come in the order of the row.
  template <class Sums>
  void by_phase(A* to, Sums sums) {
    if (phases_ == 1) return sums(0, to);
    for (int64_t p = 0; p < phases_; ++p) sums(p, result_.data() + p * stride_);
    interleave(to);
  }

  // The phases' results in the order of the row.
  void interleave(A* to) {
    const A* from = result_.data();
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
  }

  const Fir<A>& fir_;
  int64_t phases_, step_, columns_, stride_, ring_;
  bool along_first_;
  int64_t lowest_, length_, line_, begin_, end_, filled_ = 0;
  Vectors<A> lines_, mixed_, row_, result_, natural_;
  std::vector<std::vector<PhaseTap>> plan_;
  std::vector<RowTap> rows_;
  std::vector<Tap<A, A>> taps_, all_taps_;
  std::vector<std::vector<Tap<A, A>>> across_;  // separable: the taps of each phase
};

}  // namespace aigc_fast

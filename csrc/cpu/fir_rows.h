// FIR filters (fir.h) on the rows of a plane.
//
// Along a row, outputs of one phase (o mod P, with P = up / gcd(up, down)) share their taps and
// read inputs `step` = down / gcd apart: rows lie between zeros, and where step > 1 split by it, so
// that every load is of neighbours.
#pragma once

#include <numeric>

#include "aligned_buffer.h"
#include "fir.h"
#include "fir_sums.h"

namespace aigc_fast {

// Lanes a0 b0 a1 b1 ... (half 0) or those from the middle on (half 1).
template <class A>
AIGC_INLINE Vec<A> zip(Vec<A> a, Vec<A> b, int half) {
  constexpr int lanes = kLanes<A>;
  return __builtin_shuffle(
      a, b, lane_numbers<A>([=](int k) { return half * lanes / 2 + k / 2 + k % 2 * lanes; }));
}

// Every second lane of a, then of b, from lane `first`.
template <class A>
AIGC_INLINE Vec<A> every_second(Vec<A> a, Vec<A> b, int first) {
  return __builtin_shuffle(a, b, lane_numbers<A>([=](int k) { return 2 * k + first; }));
}

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
        stride_(whole(columns_)),
        ring_((fir.y.taps - 1 + (kBlockRows - 1) * fir.y.down) / fir.y.up + 1),
        along_first_(fir.separable && fir.y.up > fir.y.down) {
    const Axis& x = fir.x;
    int64_t highest;
    x.source(0, 0, &lowest_);
    x.source(x.out + phases_ - 2, x.taps - 1, &highest);
    before_ = whole(std::max<int64_t>(0, -lowest_));
    length_ = whole((highest - lowest_) / step_ + 1);
    const int64_t used = whole(before_ + highest + 1), split = step_ * length_ + kLanes<A>;
    const int64_t plain = std::max(whole(before_ + x.in) + kLanes<A>, used + step_ * kLanes<A>);
    plain_.resize(plain), split_.resize(split);
    if (along_first_) {
      line_ = width_ = phases_ * stride_;
    } else if (fir.separable) {
      line_ = plain, width_ = used;
    } else {
      line_ = step_ > 1 ? split : plain, width_ = stride_;
    }
    lines_.resize((ring_ + 1) * line_);  // the last stays zero, for rows beyond the plane
    sums_stride_ = std::max(line_, phases_ * stride_);
    sums_.resize(kBlockRows * sums_stride_);
    phase_.resize(phases_ * stride_), result_.resize(phases_ * stride_);
    blocks_.resize(fir.y.up);
    for (int64_t tap = 0; tap < fir.y.up; ++tap) blocks_[tap] = block_from(tap);
    plan_.resize(phases_);
    for (int64_t p = 0; p < phases_; ++p)
      for (int64_t k = 0; k < x.taps; ++k) {
        int64_t i;
        if (!x.source(p, k, &i)) continue;
        plan_[p].push_back({k, step_ == 1
                                   ? before_ + i
                                   : (i - lowest_) % step_ * length_ + (i - lowest_) / step_});
      }
  }

  RowFilter(const RowFilter&) = delete;

  // Before the first row of another plane, or an earlier row.
  void restart() { filled_ = made_ = 0; }

  // Row o, readable to the end of a vector. read(i, to) puts input row i at `to`, and may go on to
  // the end of a vector.
  template <class Read>
  const A* row(int64_t o, Read&& read) {
    if (o >= made_) make(o, read);
    const A* sums = sums_.data() + (o - first_) * sums_stride_;
    if (along_first_) return sums;
    return fir_.separable ? along(sums, result_.data()) : interleaved(sums, result_.data());
  }

 private:
  static int64_t whole(int64_t size) { return (size + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

  // The block whose first row reads its first input row through `tap`; for `at`, how many rows
  // further each is.
  RowBlock block_from(int64_t tap) const {
    const Axis& y = fir_.y;
    const int64_t weights = fir_.separable ? 1 : fir_.x.taps;  // of a row of the filter
    RowBlock block;
    block.step = y.down * weights;
    int kind = 0;
    for (int64_t r = 0; tap < y.taps + (kBlockRows - 1) * y.down; ++r, tap += y.up) {
      const int64_t first = tap < y.taps ? 0 : (tap - y.taps) / y.down + 1;
      const int64_t beyond = std::min<int64_t>(kBlockRows, tap / y.down + 1);
      if (first >= beyond) continue;
      while (kReaders[kind] != std::pair<int, int>(first, beyond))
        block.ends[kind++] = block.rows.size();
      block.rows.push_back({tap * weights, r});
    }
    while (kind < kKinds) block.ends[kind++] = block.rows.size();
    return block;
  }

  // The block of rows from o on.
  template <class Read>
  void make(int64_t o, Read& read) {
    const Axis& y = fir_.y;
    const int64_t at = o * y.down - y.pad, beyond = ((at % y.up) + y.up) % y.up;
    const int64_t tap = beyond ? y.up - beyond : 0, start = (at + tap) / y.up;
    const int64_t place = (start % ring_ + ring_) % ring_;
    now_ = blocks_[tap];
    for (Tap& row : now_.rows) {
      const int64_t i = start + row.at, in_ring = place + row.at;
      const bool inside = i >= 0 && i < y.in;
      row.at = (!inside ? ring_ : in_ring < ring_ ? in_ring : in_ring - ring_) * line_;
      if (inside && i >= filled_) fill(i, lines_.data() + row.at, read), filled_ = i + 1;
    }
    first_ = o, made_ = o + kBlockRows;
    static const std::vector<Taps> kColumn{{{0, 0}}};
    const A* weights = fir_.separable ? fir_.vertical.data() : fir_.taps.data();
    A* to = sums_.data();
    for (const Taps& columns : fir_.separable ? kColumn : plan_) {
      sum_block<A>(lines_.data(), now_, columns, weights, width_, to, sums_stride_);
      to += stride_;
    }
  }

  // Input row i as a line: plain, split or filtered along.
  template <class Read>
  void fill(int64_t i, A* line, Read& read) {
    const bool direct = !along_first_ && (fir_.separable || step_ == 1);
    A* row = direct ? line : plain_.data();
    read(i, row + before_);
    store(row + before_ + fir_.x.in, Vec<A>{});
    if (along_first_) {
      along(row, line);
    } else if (!direct) {
      split(row, line);
    }
  }

  // Every step-th element of a plain row beside the other.
  void split(const A* row, A* to) {
    row += before_ + lowest_;
    if (step_ == 2) {
      for (int64_t e = 0; e < length_; e += kLanes<A>) {
        const Vec<A> a = load(row + 2 * e), b = load(row + 2 * e + kLanes<A>);
        store(to + e, every_second<A>(a, b, 0));
        store(to + length_ + e, every_second<A>(a, b, 1));
      }
      return;
    }
    for (int64_t q = 0; q < step_; ++q)
      for (int64_t e = 0; e < length_; ++e) to[q * length_ + e] = row[q + step_ * e];
  }

  // A plain row filtered along.
  const A* along(const A* row, A* to) {
    if (step_ > 1) split(row, split_.data()), row = split_.data();
    A* sums = phases_ > 1 ? phase_.data() : to;
    for (int64_t p = 0; p < phases_; ++p)
      sum_row(row, plan_[p], fir_.taps.data(), columns_, sums + p * stride_);
    return interleaved(sums, to);
  }

  // The phases' results in the order of the row.
  const A* interleaved(const A* from, A* to) {
    if (phases_ == 1) return from;
    if (phases_ == 2) {
      for (int64_t m = 0; m < columns_; m += kLanes<A>) {
        const Vec<A> a = load(from + m), b = load(from + stride_ + m);
        for (int half = 0; half < 2; ++half)
          store(to + 2 * m + half * kLanes<A>, zip<A>(a, b, half));
      }
    } else if (phases_ == 4) {
      for (int64_t m = 0; m < columns_; m += kLanes<A>) {
        Vec<A> v[4];
        for (int p = 0; p < 4; ++p) v[p] = load(from + p * stride_ + m);
        for (int half = 0; half < 2; ++half) {
          const Vec<A> even = zip<A>(v[0], v[2], half), odd = zip<A>(v[1], v[3], half);
          store(to + 4 * m + 2 * half * kLanes<A>, zip<A>(even, odd, 0));
          store(to + 4 * m + (2 * half + 1) * kLanes<A>, zip<A>(even, odd, 1));
        }
      }
    } else {
      for (int64_t p = 0; p < phases_; ++p)
        for (int64_t m = 0; m < columns_; ++m) to[m * phases_ + p] = from[p * stride_ + m];
    }
    return to;
  }

  const Fir<A>& fir_;
  int64_t phases_, step_, columns_, stride_, ring_;
  bool along_first_;
  // Of a plain row: the first element that is read, the zeros before it, and after splitting the
  // elements of a part; of a line: its size, and the elements that are summed.
  int64_t lowest_, before_, length_, line_, width_, sums_stride_;
  int64_t filled_ = 0, made_ = 0, first_ = 0;  // input rows so far; rows in sums_
  AlignedBuffer<A> lines_, sums_, plain_, split_, phase_, result_;
  std::vector<RowBlock> blocks_;
  std::vector<Taps> plan_;  // of each phase
  RowBlock now_;
};

}  // namespace aigc_fast

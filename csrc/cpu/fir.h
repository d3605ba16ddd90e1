// FIR filters with zero-insertion before and decimation after: which pixels an output reads.
//
// Output pixel o reads input pixel i through tap k where i up = o down + k - pad: zeros that `up`
// inserts are never multiplied.
#pragma once

#include <algorithm>

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
    for (size_t i = 0; i < taps.size(); ++i)
      taps[i] = static_cast<A>(number_at(dense, i, "filter"));
    if (!flip) std::reverse(taps.begin(), taps.end());
    if (separable) vertical = taps;
    for (A& tap : separable ? vertical : taps) tap = static_cast<A>(tap * gain);
  }

  A weight(int64_t ky, int64_t kx) const { return taps[ky * x.taps + kx]; }
};

// Output rows of a unit of work. Pieces of a plane repeat work at their edges (an eighth of it for
// twelve taps and 32 rows), so a plane is cut only where there are few for the threads.
inline int64_t rows_of_unit(int64_t planes, int64_t rows) {
  return planes < 64 ? std::min<int64_t>(rows, 32) : rows;
}

inline void check_filter(const Tensor& filter, const char* name) {
  require(filter.numel() > 0 && (filter.dim() == 1 || filter.dim() == 2), name,
          " must have shape (height, width) or (taps,)");
}

// The input rows that output row o reads: `count` of them, the first through `tap`, and each
// further one through the up-th tap after it.
struct RowSpan {
  int64_t first, count, tap;
};
inline RowSpan rows_read(const Axis& y, int64_t o) {
  const int64_t at = o * y.down - y.pad, beyond = at + y.taps;  // of the rows with zeros between
  const int64_t first = at > 0 ? (at + y.up - 1) / y.up : 0;
  const int64_t end = std::min(y.in, beyond > 0 ? (beyond - 1) / y.up + 1 : 0);
  return {first, std::max<int64_t>(0, end - first), first * y.up - at};
}

}  // namespace aigc_fast

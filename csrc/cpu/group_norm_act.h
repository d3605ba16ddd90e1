// What the two directions of group_norm_act have in common.
#pragma once

#include "channels.h"
#include "enum_dispatch.h"
#include "group_moments.h"

#include <aigc_fast/smooth_activation.h>

namespace aigc_fast {

template <class F>
void with_smooth(int64_t act, F&& body) {
  with_enum<Smooth, kNumSmooth>(act, "activation", body);
}

// What both directions know of a call: the statistics are (batch, groups).
template <class T>
struct GroupNormCall {
  using A = Acc<T>;
  GroupShape s;
  const T* x;
  std::vector<A> weight, bias;
  A *mean, *rstd;

  // f(channel, begin, end) for the stretches of one channel in [begin, end) of group u.
  template <class F>
  AIGC_INLINE void for_channels(int64_t u, int64_t begin, int64_t end, F&& f) const {
    const int64_t first = u % s.groups * s.width();
    while (begin < end) {
      const int64_t c = begin / s.spatial, stop = std::min(end, (c + 1) * s.spatial);
      f(first + c, u * s.group_size() + begin, stop - begin);
      begin = stop;
    }
  }
  // f(piece, sample, first row, rows) for pieces of channels_last samples.
  template <class F>
  void for_row_pieces(F&& f) const {
    const int64_t pieces = s.row_pieces(), rows = s.rows();
    in_parallel(s.batch * pieces, rows * s.channels, [&](int64_t i) {
      const int64_t row = i % pieces * rows;
      f(i, i / pieces, row, std::min(rows, s.spatial - row));
    });
  }
  // A value of each group, for each of its channels: (batch, channels).
  std::vector<A> of_channels(const A* of_groups) const {
    std::vector<A> result(s.batch * s.channels);
    for (int64_t u = 0; u < s.units(); ++u)
      std::fill_n(result.data() + u * s.width(), s.width(), of_groups[u]);
    return result;
  }
};

}  // namespace aigc_fast

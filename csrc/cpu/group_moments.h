// Groups of channels in a tensor of shape (batch, channels, spatial), and their mean and variance.
//
// The tensor lies in one of two memory orders: a group's channels one after the other, or all
// channels of each position (channels_last). It is cut into pieces that the shape alone decides,
// and these are merged in double. In channels_last a piece is looked at twice while it is in the L1
// cache: its mean, then the squares of the differences from it.
#pragma once

#include "memory_order.h"
#include "row_moments.h"

namespace aigc_fast {

// Elements of a piece, and fewest rows of one in channels_last.
constexpr int64_t kGroupPiece = 4096, kMinPieceRows = 32;
// Bytes of a group that stay in the L2 cache beside what is written, and the fewest groups that
// are worth a unit each: with fewer, pieces of a group go to different threads.
constexpr int64_t kCachedBytes = 512 << 10, kMinGroups = 16;

struct GroupShape {
  int64_t batch, channels, spatial, groups;
  bool channels_last;

  int64_t width() const { return channels / groups; }       // channels of a group
  int64_t group_size() const { return width() * spatial; }  // elements of one
  int64_t units() const { return batch * groups; }
  int64_t rows() const {  // of a piece in channels_last
    return std::max(kMinPieceRows, 2 * kGroupPiece / channels);
  }
  int64_t row_pieces() const { return (spatial + rows() - 1) / rows(); }
  bool cached(int64_t item) const {
    return group_size() * item <= kCachedBytes &&
           (units() >= kMinGroups || group_size() <= kGroupPiece);
  }
};

inline GroupShape group_shape_of(const Tensor& x, int64_t groups, const MaybeTensor& weight,
                                 const MaybeTensor& bias) {
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  const int64_t channels = x.size(1);
  require(groups > 0 && channels % groups == 0, "num_groups must divide the channels of x");
  for (const auto* p : {&weight, &bias})
    require(!*p || ((*p)->dim() == 1 && (*p)->size(0) == channels &&
                    (*p)->scalar_type() == x.scalar_type()),
            "weight and bias must have shape (", channels, ",) and the dtype of x");
  return {x.size(0), channels, positions_of(x), groups, is_channels_last(x)};
}

// Mean of `count` elements and the sum of their squared differences from it; two of them merge by
// the formula of Chan, Golub and LeVeque.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(const Moments& other) {
    const double total = count + other.count, delta = other.mean - mean;
    squares += other.squares + delta * delta * count * (other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
  // What the differences from a rounded mean leave over goes to the mean.
  static Moments around(double mean, double count, double sum, double squares) {
    return {count, mean + sum / count, squares - sum * (sum / count)};
  }
};

template <class T>
Moments moments(const T* x, int64_t count) {
  const auto found = row_moments<T, true, 0, 1>({x}, count, [](auto...) {});
  return Moments::around(found.near, count, found.sums[0], found.sums[1]);
}

// The moments of every group in `rows` rows of all channels.
template <class T>
void moments(const GroupShape& s, const T* x, int64_t rows, Moments* result) {
  using A = Acc<T>;
  std::vector<A> buffer(3 * s.channels);
  A *sums = buffer.data(), *mean = sums + 2 * s.channels;
  const int64_t width = s.width();
  sum_columns<T, 1, 1, 0>(rows, s.channels, {x}, {}, sums,
                          [](auto& v, auto&, Vec<A>* to) { to[0] += v[0]; });
  for (int64_t g = 0; g < s.groups; ++g) {
    A sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c];
    std::fill_n(mean + g * width, width, sum / (rows * width));
  }
  sum_columns<T, 2, 1, 1>(rows, s.channels, {x}, {mean}, sums, [](auto& v, auto& p, Vec<A>* to) {
    const Vec<A> d = v[0] - p[0];
    to[0] += d;
    to[1] += d * d;
  });
  for (int64_t g = 0; g < s.groups; ++g) {
    double rest = 0, squares = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      rest += sums[c], squares += sums[s.channels + c];
    result[g] = Moments::around(mean[g * width], rows * width, rest, squares);
  }
}

}  // namespace aigc_fast

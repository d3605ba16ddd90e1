// Anti-aliased snake: up by 2 with a filter of 12 taps, snake, down by 2 with another, and its
// backward, tile by tile in the cache.
//
// The upsampled signal is kept as its even and odd samples. With x continued beyond its ends by
// its first and last value,
//   even[s] = sum 2 up[5 - 2d] x[s + d], d = -3..2;   odd[s] = sum 2 up[6 - 2d] x[s + d], d = -2..3
//   y[t] = sum down[2d + 5] even[t + d], d = -2..3,  + sum down[2d + 6] odd[t + d], d = -3..2
// where even and odd hold snake's values, continued by even[0] and odd[time - 1]. The adjoint of
// either line is the other one, with its taps; that of continuing a signal is to add what lies
// beyond an end to the sample there.
#include "snake.h"
#include "sums.h"

namespace aigc_fast {
namespace {

constexpr int kTaps = 12, kReach = 3;  // a sample reads others at most kReach away
constexpr int64_t kTileSamples = 512;  // tiles have this many samples or up to twice as many

// Samples computed before a tile: whole vectors that hold kReach.
template <class A>
constexpr int64_t kHalo = (kReach + kLanes<A> - 1) / kLanes<A> * kLanes<A>;

template <class A>
struct Pair {
  Vec<A> even, odd;
};

// From the far taps, which are the small ones, to the near: so the sums round least.
constexpr int kOrder[] = {3, -3, 2, -2, 1, -1, 0};

template <class A>
AIGC_INLINE Pair<A> split(const A* taps, const A* in) {
  Pair<A> sum = {};
#pragma GCC unroll 7
  for (const int d : kOrder) {
    const Vec<A> v = load(in + d);
    if (d < kReach) sum.even += v * taps[5 - 2 * d];
    if (d > -kReach) sum.odd += v * taps[6 - 2 * d];
  }
  return sum;
}

template <class A>
AIGC_INLINE Vec<A> merge(const A* taps, const A* even, const A* odd) {
  Vec<A> a = {}, b = {};
#pragma GCC unroll 7
  for (const int d : kOrder) {
    if (d > -kReach) a += load(even + d) * taps[2 * d + 5];
    if (d < kReach) b += load(odd + d) * taps[2 * d + 6];
  }
  return a + b;
}

// A tile's samples with a margin, in the dtype of computing; sample 0 is the tile's first.
template <class A>
class Line {
 public:
  static constexpr int64_t kMargin = 32;
  static_assert(kHalo<A> + kReach <= kMargin && kReach + kLanes<A> + kReach <= kMargin);
  Line() : memory_(2 * kTileSamples + 2 * kMargin) {}
  operator A*() { return memory_.data() + kMargin; }

  // Samples [first, first + size) of a row of `time`, and the margins; beyond the row's ends the
  // samples there, or zeros.
  template <class T>
  void fill(const T* row, int64_t time, int64_t first, int64_t size, bool zeros) {
    const int64_t begin = std::max<int64_t>(0, first - kMargin);
    const int64_t end = std::min(time, first + size + kMargin);
    A* at = memory_.data() + kMargin - first;
    if constexpr (std::is_same_v<A, Acc<T>>) {
      convert(row + begin, end - begin, at + begin);
    } else {
      std::copy(row + begin, row + end, at + begin);
    }
    const auto beyond = [&](int64_t i) { return zeros ? A(0) : A(load_one(row + i)); };
    std::fill(at + first - kMargin, at + begin, beyond(0));
    std::fill(at + end, at + first + size + kMargin, beyond(time - 1));
  }

 private:
  std::vector<A> memory_;
};

template <class A>
A take_sum(A* begin, A* end) {
  A sum = 0;
  for (; begin != end; ++begin) sum += std::exchange(*begin, A(0));
  return sum;
}

template <class A>
struct Snake {
  A alpha, inverse_beta;
};

// A tile of a row: samples [first, first + size) of `time`.
struct RowTile {
  int64_t time, first, size;

  bool at_start() const { return first == 0; }
  bool at_end() const { return first + size == time; }
};

template <class T, class A = Acc<T>>
struct Forward {
  A up[kTaps], down[kTaps];
  Line<A> x, even, odd;

  void operator()(const T* in, T* out, RowTile t, Snake<A> p) {
    x.fill(in, t.time, t.first, t.size, false);
    for (int64_t s = -kHalo<A>; s < t.size + kReach; s += kLanes<A>) {
      const Pair<A> z = split<A>(up, x + s);
      const Vec<A> a = broadcast(p.alpha);
      store(even + s, z.even + sines<T, A>(a * z.even).squared * p.inverse_beta);
      store(odd + s, z.odd + sines<T, A>(a * z.odd).squared * p.inverse_beta);
    }
    for (int64_t k = 0; k < kReach; ++k) {
      if (t.at_start()) even[-1 - k] = odd[-1 - k] = even[0];
      if (t.at_end()) even[t.size + k] = odd[t.size + k] = odd[t.size - 1];
    }
    for_vectors<A>(t.size, [&](int64_t i, auto lanes) {
      store(out + t.first + i, merge<A>(down, even + i, odd + i), lanes);
    });
  }
};

// fp32 tensors take fp64 here: the gradients of alpha and beta are sums whose terms cancel, and
// each carries what two filters and the sine's argument rounded.
template <class T>
using Exact = std::conditional_t<std::is_same_v<T, float>, double, Acc<T>>;

template <class T, class A = Exact<T>>
struct Backward {
  A up[kTaps], down[kTaps];
  Line<A> x, grad, even, odd;

  // Sums for the gradients of alpha and beta, but for powers of 1 / beta, into sums[2].
  void operator()(const T* in, const T* dy, T* dx, double* sums, RowTile t, Snake<A> p) {
    constexpr int lanes = kLanes<A>;
    x.fill(in, t.time, t.first, t.size, false);
    grad.fill(dy, t.time, t.first, t.size, true);
    for (int64_t s = -kHalo<A>; s < t.size + kReach; s += lanes) {
      const Pair<A> d = split<A>(down, grad + s);
      store(even + s, d.even);
      store(odd + s, d.odd);
    }
    if (t.at_start()) even[0] += take_sum<A>(even - kReach, even) + take_sum<A>(odd - kReach, odd);
    if (t.at_end()) {
      A *e = even + t.size, *o = odd + t.size;
      o[-1] += take_sum<A>(e, e + kReach) + take_sum<A>(o, o + kReach);
    }
    // Gradients of snake's values become those of its arguments, in the tile and its margins.
    Wide<A> total[2];
    const auto through_snake = [&](int64_t s, auto n) __attribute__((always_inline)) {
      const Pair<A> z = split<A>(up, x + s);
      const auto one = [&](A* d, Vec<A> z) __attribute__((always_inline)) {
        const Vec<A> a = broadcast(p.alpha), g = only<A>(load(d, n), n);
        const Sines<A> sine = sines<T, A>(a * z);
        store(d, g * (A(1) + p.alpha * p.inverse_beta * sine.sin_twice), n);
        total[0] += widen<A>(g * only<A>(z * sine.sin_twice, n));
        total[1] += widen<A>(g * only<A>(sine.squared, n));
      };
      one(even + s, z.even);
      one(odd + s, z.odd);
    };
    constexpr std::integral_constant<int, lanes> all;
    for (int64_t k = 0; k < kHalo<A>; k += lanes) {
      through_snake(k - kHalo<A>, all);
      through_snake(t.size + k, all);
    }
    total[0] = total[1] = {};  // a margin is another tile's
    for_vectors<A>(t.size, through_snake);
    for (int k = 0; k < 2; ++k) sums[k] = total[k].sum();
    for (int64_t s = -kHalo<A>; s < t.size + kReach; s += lanes)
      store(grad + s, merge<A>(up, even + s, odd + s));
    if (t.at_start()) grad[0] += take_sum<A>(grad - kReach, grad);
    if (t.at_end()) {
      A* end = grad + t.size;
      end[-1] += take_sum<A>(end, end + kReach);
    }
    if constexpr (std::is_same_v<A, Acc<T>>) {
      convert(static_cast<const A*>(grad), t.size, dx + t.first);
    } else {
      std::copy_n(static_cast<A*>(grad), t.size, dx + t.first);
    }
  }
};

struct Shape {
  int64_t rows, channels, time, pieces;

  RowTile tile(int64_t piece) const {
    const int64_t first = piece * time / pieces;
    return {time, first, (piece + 1) * time / pieces - first};
  }
};

Shape check(const Tensor& x, const Tensor& alpha, const Tensor& beta) {
  require(x.dim() == 3, "x must have 3 dimensions");
  require(x.size(2) > 0, "x must have at least one sample");
  require(alpha.scalar_type() == x.scalar_type(), "alpha must have the dtype of x");
  require(beta.scalar_type() == x.scalar_type(), "beta must have the dtype of x");
  const int64_t time = x.size(2);
  return {x.size(0) * x.size(1), x.size(1), time, std::max<int64_t>(1, time / kTileSamples)};
}

// What all tiles share, and for_tiles(make, f), which calls f(unit, row, tile, work) in parallel.
template <class A>
struct Parameters {
  A up[kTaps], down[kTaps];
  std::vector<A> alpha;
  std::vector<double> inverse_beta;

  Parameters(const Shape& s, const Tensor& alpha_in, const Tensor& beta_in, const Tensor& up_filter,
             const Tensor& down_filter)
      : alpha(channel_values<A>(alpha_in, s.channels, "alpha", 0)),
        inverse_beta(inverse_of(beta_in, s.channels)) {
    channel_values<A>(up_filter, kTaps, "up_filter", A(0), up);
    channel_values<A>(down_filter, kTaps, "down_filter", A(0), down);
    for (A& tap : up) tap *= 2;
  }

  template <class Work, class F>
  void for_tiles(const Shape& s, F f) const {
    const int64_t grain = grain_of(4 * (s.time / s.pieces));
    torch::stable::parallel_for(0, s.rows * s.pieces, grain, [&](int64_t begin, int64_t end) {
      Work work;
      std::copy_n(up, kTaps, work.up);
      std::copy_n(down, kTaps, work.down);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t row = u / s.pieces, c = row % s.channels;
        f(work, u, row * s.time, s.tile(u % s.pieces), Snake<A>{alpha[c], A(inverse_beta[c])});
      }
    });
  }
};

Tensor alias_free_snake(const Tensor& x_in, const Tensor& alpha, const Tensor& beta,
                        const Tensor& up_filter, const Tensor& down_filter) {
  const Shape shape = check(x_in, alpha, beta);
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_like_dense(x);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Parameters<A> shared(shape, alpha, beta, up_filter, down_filter);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    shared.template for_tiles<Forward<T>>(
        shape, [&](auto& work, int64_t, int64_t at, RowTile tile, Snake<A> snake) {
          work(in + at, out + at, tile, snake);
        });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> alias_free_snake_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& alpha, const Tensor& beta,
    const Tensor& up_filter, const Tensor& down_filter) {
  const Shape shape = check(x_in, alpha, beta);
  check_like(dy_in, x_in, "grad_output");
  const Tensor x = as_contiguous(x_in), dy = as_contiguous(dy_in);
  Tensor dx = empty_like_dense(x);
  std::vector<double> parts(2 * shape.rows * shape.pieces);
  std::vector<double> dalpha(shape.channels), dbeta(shape.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Exact<T>;
    const Parameters<A> shared(shape, alpha, beta, up_filter, down_filter);
    const T *in = data<T>(x), *grad = data<T>(dy);
    T* out = mutable_data<T>(dx);
    shared.template for_tiles<Backward<T>>(
        shape, [&](auto& work, int64_t unit, int64_t at, RowTile tile, Snake<A> snake) {
          work(in + at, grad + at, out + at, parts.data() + 2 * unit, tile, snake);
        });
    for (int64_t u = 0; u < shape.rows * shape.pieces; ++u) {
      const int64_t c = u / shape.pieces % shape.channels;
      const double b = shared.inverse_beta[c];
      dalpha[c] += parts[2 * u] * b;
      dbeta[c] -= parts[2 * u + 1] * b * b;
    }
  });
  return {dx, like_parameter(dalpha, alpha, x.scalar_type()),
          like_parameter(dbeta, beta, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("alias_free_snake", TORCH_BOX(&alias_free_snake));
  m.impl("alias_free_snake_backward", TORCH_BOX(&alias_free_snake_backward));
}

}  // namespace
}  // namespace aigc_fast

// Anti-aliased snake: up by 2 with a filter of 12 taps, snake, down by 2 with another, and its
// backward, tile by tile in the cache.
//
// A tile is some samples of one channel or, where channels are innermost in memory, of several side
// by side: there a sample lies `width` elements from the one before it, and a vector holds whatever
// `kLanes` neighbours in memory are.
//
// The upsampled signal is kept as its even and odd samples. With x continued beyond its ends by
// its first and last value,
//   even[s] = sum 2 up[5 - 2d] x[s + d], d = -3..2;   odd[s] = sum 2 up[6 - 2d] x[s + d], d = -2..3
//   y[t] = sum down[2d + 5] even[t + d], d = -2..3,  + sum down[2d + 6] odd[t + d], d = -3..2
// where even and odd hold snake's values, continued by even[0] and odd[time - 1]. The adjoint of
// either line is the other one, with its taps; that of continuing a signal is to add what lies
// beyond an end to the sample there.
#include "aligned_buffer.h"
#include "memory_order.h"
#include "snake.h"
#include "sums.h"

namespace aigc_fast {
namespace {

constexpr int kTaps = 12, kReach = 3;  // a sample reads others at most kReach away
constexpr int64_t kTileSamples = 512;  // tiles have this many samples or up to twice as many
// The same of tiles with channels side by side, in elements; and channels of these, or up to twice
// as many.
constexpr int64_t kTileElements = 4096, kTileChannels = 64;
// The distance of a channel's samples where they are neighbours: known to the compiler.
using One = std::integral_constant<int64_t, 1>;

template <class A>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}
// Samples computed before a tile of one channel: whole vectors that hold kReach.
template <class A>
constexpr int64_t kHalo = whole_vectors<A>(kReach);

template <class A>
struct Pair {
  Vec<A> even, odd;
};

// From the far taps, which are the small ones, to the near: so the sums round least.
constexpr int kOrder[] = {3, -3, 2, -2, 1, -1, 0};

template <class A, class Width = One>
AIGC_INLINE Pair<A> split(const A* taps, const A* in, Width width = {}) {
  Pair<A> sum = {};
#pragma GCC unroll 7
  for (const int d : kOrder) {
    const Vec<A> v = load(in + d * width);
    if (d < kReach) sum.even += v * taps[5 - 2 * d];
    if (d > -kReach) sum.odd += v * taps[6 - 2 * d];
  }
  return sum;
}

template <class A, class Width = One>
AIGC_INLINE Vec<A> merge(const A* taps, const A* even, const A* odd, Width width = {}) {
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
struct Tile {
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

// A tile's samples with a margin, in the dtype of computing; element 0 is the tile's first.
template <class A>
class Line {
 public:
  // Room for a tile of so many elements, of any width up to this.
  Line(int64_t elements, int64_t width)
      : before_(whole_vectors<A>(margin(width) * width)), memory_(elements + 2 * before_) {}
  operator A*() { return memory_.data() + before_; }

  // A tile's samples and the margins; beyond the sequence's ends the samples there, or zeros.
  template <class T>
  void fill(const T* from, const Tile& t, bool zeros) {
    const int64_t around = margin(t.width), last = t.first + t.size + around;
    const int64_t begin = std::max<int64_t>(0, t.first - around), end = std::min(t.time, last);
    A* line = *this;
    t.for_runs(begin, end, [&](int64_t place, int64_t at, int64_t n) {
      if constexpr (std::is_same_v<A, Acc<T>>) {
        convert(from + place, n, line + at);
      } else {
        std::copy_n(from + place, n, line + at);
      }
    });
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

template <class A>
A take_sum(A* begin, A* end) {
  A sum = 0;
  for (; begin != end; ++begin) sum += std::exchange(*begin, A(0));
  return sum;
}

// Of the channels of a tile.
template <class A>
struct Snake {
  const A* alpha;
  const double* inverse_beta;
};

template <class T, class A = Acc<T>>
struct Forward {
  A up[kTaps], down[kTaps];
  Line<A> x, even, odd;
  std::vector<A> alpha, inverse_beta;  // of the channels in turn, a vector from any of them on
  const A* channels = nullptr;         // which: the same for tiles that follow one another

  Forward(int64_t elements, int64_t width)
      : x(elements, width), even(elements, width), odd(elements, width) {}

  void operator()(const T* in, T* out, const Tile& t, Snake<A> p) {
    if (p.alpha != channels) repeat(p, t.width);
    x.fill(in, t, false);
    t.stride == 1 ? run(out, t, One{}) : run(out, t, t.width);
  }

 private:
  void repeat(Snake<A> p, int64_t width) {
    alpha.resize(width + kLanes<A>), inverse_beta.resize(width + kLanes<A>);
    for (int64_t c = 0; c < width + kLanes<A>; ++c) {
      alpha[c] = p.alpha[c % width];
      inverse_beta[c] = static_cast<A>(p.inverse_beta[c % width]);
    }
    channels = p.alpha;
  }

  template <class Width>
  void run(T* out, const Tile& t, Width width) {
    constexpr int lanes = kLanes<A>;
    // What is behind these pointers changes, but not they.
    const A *const in = x, *const alphas = alpha.data(), *const betas = inverse_beta.data();
    A *const even = this->even, *const odd = this->odd;
    const int64_t before = whole_vectors<A>(kReach * width);
    int64_t c = (width - before % width) % width;  // the channel of the first lane
    Vec<A> a = load(alphas + c), b = load(betas + c);
    for (int64_t e = -before; e < (t.size + kReach) * width; e += lanes) {
      const Pair<A> z = split<A>(up, in + e, width);
      store(even + e, z.even + sines<T, A>(a * z.even).squared * b);
      store(odd + e, z.odd + sines<T, A>(a * z.odd).squared * b);
      if (width == 1) continue;
      c += lanes % width;
      if (c >= width) c -= width;
      a = load(alphas + c), b = load(betas + c);
    }
    const auto hold = [&](int64_t sample, const A* value) {
      for (A* line : {even, odd}) std::copy_n(value, int64_t{width}, line + sample * width);
    };
    for (int64_t k = 0; k < kReach; ++k) {
      if (t.at_start()) hold(-1 - k, even);
      if (t.at_end()) hold(t.size + k, odd + (t.size - 1) * width);
    }
    t.for_runs(t.first, t.first + t.size, [&](int64_t place, int64_t at, int64_t count) {
      for_vectors<A>(count, [&](int64_t i, auto n) {
        store(out + place + i, merge<A>(down, even + at + i, odd + at + i, width), n);
      });
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

  Backward(int64_t elements, int64_t width)
      : x(elements, width), grad(elements, width), even(elements, width), odd(elements, width) {}

  // Sums for the gradients of alpha and beta, but for powers of 1 / beta, into sums[2]; of tiles of
  // one channel.
  void operator()(const T* in, const T* dy, T* dx, double* sums, const Tile& t, Snake<A> p) {
    constexpr int lanes = kLanes<A>;
    const A alpha = *p.alpha, inverse_beta = static_cast<A>(*p.inverse_beta);
    x.fill(in, t, false);
    grad.fill(dy, t, true);
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
        const Vec<A> a = broadcast(alpha), g = only<A>(load(d, n), n);
        const Sines<A> sine = sines<T, A>(a * z);
        store(d, g * (A(1) + alpha * inverse_beta * sine.sin_twice), n);
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

// x as tiles, which its shape and memory order alone decide.
struct Shape {
  int64_t batch, channels, time;
  bool innermost;  // the channels, in memory
  int64_t width = 1, blocks = 1, pieces = 1;

  int64_t tiles() const { return batch * blocks * pieces; }
  int64_t first_channel(int64_t u) const { return u / pieces % blocks * width; }
  // Where the sequences of a tile begin.
  int64_t place(int64_t u) const {
    const int64_t n = u / pieces / blocks, c = first_channel(u);
    return n * channels * time + (innermost ? c : c * time);
  }
  Tile tile(int64_t u) const {
    const int64_t first = u % pieces * time / pieces, end = (u % pieces + 1) * time / pieces;
    const bool last = u / pieces % blocks == blocks - 1;
    const int64_t wide = last ? channels - first_channel(u) : width;
    return {time, first, end - first, wide, innermost ? channels : 1};
  }
  // At most, of any tile.
  int64_t widest() const { return channels - (blocks - 1) * width; }
  int64_t elements() const { return (time + pieces - 1) / pieces * widest(); }
};

Shape check(const Tensor& x, const Tensor& alpha, const Tensor& beta, bool innermost) {
  require(x.dim() == 3, "x must have 3 dimensions");
  require(x.size(2) > 0, "x must have at least one sample");
  require(alpha.scalar_type() == x.scalar_type(), "alpha must have the dtype of x");
  require(beta.scalar_type() == x.scalar_type(), "beta must have the dtype of x");
  Shape s{x.size(0), x.size(1), x.size(2), innermost};
  const int64_t across = std::max<int64_t>(1, s.channels / kTileChannels);
  s.blocks = innermost ? across : s.channels;
  s.width = !innermost ? 1 : across > 1 ? kTileChannels : s.channels;
  const int64_t samples = innermost ? kTileElements / std::max<int64_t>(1, s.width) : kTileSamples;
  s.pieces = std::max<int64_t>(1, s.time / std::max<int64_t>(1, samples));
  return s;
}

// What all tiles share, and for_tiles<Work>(shape, f), which calls f(work, number, place, tile,
// snake) for every tile, in parallel.
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
    const int64_t grain = grain_of(4 * s.elements());
    torch::stable::parallel_for(0, s.tiles(), grain, [&](int64_t begin, int64_t end) {
      Work work(s.elements(), s.widest());
      std::copy_n(up, kTaps, work.up);
      std::copy_n(down, kTaps, work.down);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t c = s.first_channel(u);
        f(work, u, s.place(u), s.tile(u), Snake<A>{alpha.data() + c, inverse_beta.data() + c});
      }
    });
  }
};

Tensor alias_free_snake(const Tensor& x_in, const Tensor& alpha, const Tensor& beta,
                        const Tensor& up_filter, const Tensor& down_filter) {
  const Shape shape = check(x_in, alpha, beta, is_channels_innermost(x_in));
  const Tensor x = shape.innermost ? x_in : as_contiguous(x_in);
  Tensor y = empty_in_order(x, shape.innermost);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const Parameters<A> shared(shape, alpha, beta, up_filter, down_filter);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    shared.template for_tiles<Forward<T>>(
        shape, [&](auto& work, int64_t, int64_t at, const Tile& tile, Snake<A> snake) {
          work(in + at, out + at, tile, snake);
        });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> alias_free_snake_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& alpha, const Tensor& beta,
    const Tensor& up_filter, const Tensor& down_filter) {
  const Shape shape = check(x_in, alpha, beta, false);
  check_like(dy_in, x_in, "grad_output");
  const Tensor x = as_contiguous(x_in), dy = as_contiguous(dy_in);
  Tensor dx = empty_like_dense(x);
  std::vector<double> parts(2 * shape.tiles());
  std::vector<double> dalpha(shape.channels), dbeta(shape.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Exact<T>;
    const Parameters<A> shared(shape, alpha, beta, up_filter, down_filter);
    const T *in = data<T>(x), *grad = data<T>(dy);
    T* out = mutable_data<T>(dx);
    shared.template for_tiles<Backward<T>>(
        shape, [&](auto& work, int64_t u, int64_t at, const Tile& tile, Snake<A> snake) {
          work(in + at, grad + at, out + at, parts.data() + 2 * u, tile, snake);
        });
    for (int64_t u = 0; u < shape.tiles(); ++u) {
      const int64_t c = shape.first_channel(u);
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

// The derivative of alias_free_snake, tile by tile in the cache; tiles are of one channel.
#include "alias_free_snake.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// Samples computed before a tile of one channel: whole vectors that hold kReach.
template <class A>
constexpr int64_t kHalo = whole_vectors<A>(kReach);

// The sum of these numbers, which become zero.
template <class A>
A take_sum(A* begin, A* end) {
  A sum = 0;
  for (; begin != end; ++begin) sum += std::exchange(*begin, A(0));
  return sum;
}

template <class T, class A = Acc<T>>
struct Backward {
  A up[kTaps], down[kTaps];
  SequenceLine<A> x, grad, even, odd;

  Backward(int64_t elements, int64_t width)
      : x(elements, width), grad(elements, width), even(elements, width), odd(elements, width) {}

  // Sums for the gradients of alpha and beta, but for powers of 1 / beta, into sums[2].
  void operator()(const T* in, const T* dy, T* dx, double* sums, const SequenceTile& t,
                  ChannelSnake<A> p) {
    constexpr int lanes = kLanes<A>;
    const A alpha = *p.alpha, inverse_beta = static_cast<A>(*p.inverse_beta);
    x.fill(in, t, false);
    grad.fill(dy, t, true);
    for (int64_t s = -kHalo<A>; s < t.size + kReach; s += lanes) {
      const Phases<A> d = to_phases<A>(down, grad + s);
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
      const Phases<A> z = to_phases<A>(up, x + s);
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
      store(grad + s, from_phases<A>(up, even + s, odd + s));
    if (t.at_start()) grad[0] += take_sum<A>(grad - kReach, grad);
    if (t.at_end()) {
      A* end = grad + t.size;
      end[-1] += take_sum<A>(end, end + kReach);
    }
    copy_as(static_cast<const A*>(grad), t.size, dx + t.first);
  }
};

std::tuple<Tensor, Tensor, Tensor> alias_free_snake_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& alpha, const Tensor& beta,
    const Tensor& up_filter, const Tensor& down_filter) {
  const SequenceTiles tiles = sequence_tiles(x_in, alpha, beta, false);
  check_like(dy_in, x_in, "grad_output");
  const Tensor x = as_contiguous(x_in), dy = as_contiguous(dy_in);
  Tensor dx = empty_like_dense(x);
  std::vector<double> parts(2 * tiles.count());
  std::vector<double> dalpha(tiles.channels), dbeta(tiles.channels);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const AliasFreeCall<A> shared(tiles, alpha, beta, up_filter, down_filter);
    const T *in = data<T>(x), *grad = data<T>(dy);
    T* out = mutable_data<T>(dx);
    shared.template for_tiles<Backward<T>>(
        tiles, [&](auto& work, int64_t u, int64_t at, const auto& tile, auto snake) {
          work(in + at, grad + at, out + at, parts.data() + 2 * u, tile, snake);
        });
    for (int64_t u = 0; u < tiles.count(); ++u) {
      const int64_t c = tiles.first_channel(u);
      const double b = shared.inverse_beta[c];
      dalpha[c] += parts[2 * u] * b;
      dbeta[c] -= parts[2 * u + 1] * b * b;
    }
  });
  return {dx, like_parameter(dalpha, alpha, x.scalar_type()),
          like_parameter(dbeta, beta, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("alias_free_snake_backward", TORCH_BOX(&alias_free_snake_backward));
}

}  // namespace
}  // namespace aigc_fast

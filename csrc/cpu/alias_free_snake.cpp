// Anti-aliased snake: up by 2, snake, down by 2, tile by tile in the cache.
#include "alias_free_snake.h"

namespace aigc_fast {
namespace {

template <class T, class A = Acc<T>>
struct Forward {
  A up[kTaps], down[kTaps];
  SequenceLine<A> x, even, odd;
  std::vector<A> alpha, inverse_beta;  // of the channels in turn, a vector from any of them on
  const A* channels = nullptr;         // which: the same for tiles that follow one another

  Forward(int64_t elements, int64_t width)
      : x(elements, width), even(elements, width), odd(elements, width) {}

  void operator()(const T* in, T* out, const SequenceTile& t, ChannelSnake<A> p) {
    if (p.alpha != channels) repeat(p, t.width);
    x.fill(in, t, false);
    t.stride == 1 ? run(out, t, One{}) : run(out, t, t.width);
  }

 private:
  void repeat(ChannelSnake<A> p, int64_t width) {
    alpha.resize(width + kLanes<A>), inverse_beta.resize(width + kLanes<A>);
    for (int64_t c = 0; c < width + kLanes<A>; ++c) {
      alpha[c] = p.alpha[c % width];
      inverse_beta[c] = static_cast<A>(p.inverse_beta[c % width]);
    }
    channels = p.alpha;
  }

  template <class Width>
  void run(T* out, const SequenceTile& t, Width width) {
    constexpr int lanes = kLanes<A>;
    // What is behind these pointers changes, but not they.
    const A *const in = x, *const alphas = alpha.data(), *const betas = inverse_beta.data();
    A *const even = this->even, *const odd = this->odd;
    const int64_t before = whole_vectors<A>(kReach * width);
    int64_t c = (width - before % width) % width;  // the channel of the first lane
    Vec<A> a = load(alphas + c), b = load(betas + c);
    for (int64_t e = -before; e < (t.size + kReach) * width; e += lanes) {
      const Phases<A> z = to_phases<A>(up, in + e, width);
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
        store(out + place + i, from_phases<A>(down, even + at + i, odd + at + i, width), n);
      });
    });
  }
};

Tensor alias_free_snake(const Tensor& x_in, const Tensor& alpha, const Tensor& beta,
                        const Tensor& up_filter, const Tensor& down_filter) {
  const SequenceTiles tiles = sequence_tiles(x_in, alpha, beta, is_channels_innermost(x_in));
  const Tensor x = tiles.innermost ? x_in : as_contiguous(x_in);
  Tensor y = empty_in_order(x, tiles.innermost);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const AliasFreeCall<A> shared(tiles, alpha, beta, up_filter, down_filter);
    const T* in = data<T>(x);
    T* out = mutable_data<T>(y);
    shared.template for_tiles<Forward<T>>(
        tiles, [&](auto& work, int64_t, int64_t at, const auto& tile, auto snake) {
          work(in + at, out + at, tile, snake);
        });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("alias_free_snake", TORCH_BOX(&alias_free_snake));
}

}  // namespace
}  // namespace aigc_fast

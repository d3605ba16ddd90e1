// Walks over a dense tensor channel by channel: sums over each channel, then a pass that uses them.
//
// With dimension 1 at stride `inner`, element i in memory order has channel (i / inner) % channels.
// A channel of a contiguous tensor is read for its sums and at once again for the result, while it
// lies in the cache: the channel is the unit of work. Where channels are innermost (channels_last,
// and matrices) blocks of rows are, in two passes over memory.
#pragma once

#include <utility>

#include "tensor.h"

namespace aigc_fast {

struct Channels {
  int64_t size, channels, inner;

  int64_t count() const { return channels ? size / channels : 0; }  // elements of a channel
  bool innermost() const { return inner == 1; }
};

inline Channels channels_of(const Tensor& x) {
  require(x.dim() >= 2, "x must have at least 2 dimensions");
  const int64_t size = x.numel(), channels = x.size(1);
  // The stride of a dimension of one element says nothing.
  return {size, channels, channels == 1 ? std::max<int64_t>(size, 1) : x.stride(1)};
}

// Elements whose sums meet in fp32 before fp64 takes over; 16 KB stay in L1 for a second pass.
constexpr int64_t kBlock = 4096;
// Rows of channels that a thread takes at a time: about 64 KB, but enough that the sums of the
// blocks are little beside the rows.
inline int64_t rows_of_block(const Channels& l) {
  return std::max<int64_t>(32, 16384 / std::max<int64_t>(1, l.channels));
}

// Calls block(n, for_each) for blocks of about kBlock elements of channel c; for_each(f) calls
// f(i, lanes) for the vectors of the block's n elements.
template <class A, class F>
AIGC_INLINE void for_blocks(const Channels& l, int64_t c, F&& block) {
  const int64_t rows = l.count() / l.inner;
  const int64_t height = std::max<int64_t>(1, kBlock / l.inner), width = std::min(l.inner, kBlock);
  for (int64_t r = 0; r < rows; r += height)
    for (int64_t start = 0; start < l.inner; start += width) {
      const int64_t last = std::min(rows, r + height), n = std::min(width, l.inner - start);
      block((last - r) * n, [&](auto&& f) __attribute__((always_inline)) {
        for (int64_t row = r; row < last; ++row) {
          const int64_t at = (row * l.channels + c) * l.inner + start;
          for_vectors<A>(
              n, [&](int64_t j, auto lanes) __attribute__((always_inline)) { f(at + j, lanes); });
        }
      });
    }
}

// Calls f(first row, last row, block) for blocks of rows, in parallel.
template <class F>
void for_row_blocks(const Channels& l, F f) {
  const int64_t block = rows_of_block(l), rows = l.count();
  torch::stable::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b * block, std::min(rows, (b + 1) * block), b);
  });
}

// ---- what is summed ----------------------------------------------------------------------------

// Terms of an fp32 sum that meet before they join the others: short chains round less.
constexpr int64_t kChain = 8;

// N sums over every channel: add(i, lanes, values, sums) adds to them, nothing in unused lanes.
template <class A, int V, int N, class F>
struct Sums {
  static constexpr int kSums = N;
  F add;

  void channel(const Channels& l, int64_t c, const Vec<A>* values, double* out) const {
    for (int s = 0; s < N; ++s) out[s] = 0;
    for_blocks<A>(l, c, [&](int64_t, auto for_each) {
      Vec<A> sums[N] = {}, chain[N] = {};
      int64_t terms = 0;
      for_each([&](int64_t i, auto lanes) __attribute__((always_inline)) {
        add(i, lanes, values, chain);
        if (++terms % kChain) return;
        for (int s = 0; s < N; ++s) sums[s] += std::exchange(chain[s], Vec<A>{});
      });
      for (int s = 0; s < N; ++s) out[s] += sum_lanes<A>(sums[s] + chain[s]);
    });
  }

  void rows(const Channels& l, const A* values, double* out) const {
    const int64_t width = l.channels, block = rows_of_block(l);
    const int64_t blocks = (l.count() + block - 1) / block;
    std::vector<A> parts(blocks * N * width);
    for_row_blocks(l, [&](int64_t first, int64_t last, int64_t b) {
      A* part = parts.data() + b * N * width;
      for (int64_t start = first; start < last; start += kChain)
        for_vectors<A>(width, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
          Vec<A> at[V], sums[N] = {};
          for (int v = 0; v < V; ++v) at[v] = load(values + v * width + j, lanes);
          for (int64_t r = start; r < std::min(last, start + kChain); ++r)
            add(r * width + j, lanes, at, sums);
          for (int s = 0; s < N; ++s)
            store(part + s * width + j, load(part + s * width + j, lanes) + sums[s], lanes);
        });
    });
    std::fill(out, out + N * width, 0.0);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < N * width; ++i) out[i] += parts[b * N * width + i];
  }
};
template <class A, int V, int N, class F>
Sums<A, V, N, F> sums(F add) {
  return {add};
}

struct NoSums {
  static constexpr int kSums = 1;
  template <class... Args>
  void channel(const Args&...) const {}
  template <class... Args>
  void rows(const Args&...) const {}
};

// ---- the walk ----------------------------------------------------------------------------------

// The sums of channels that are innermost, then finish(c, sums) for each.
template <class A, class S, class Finish>
void sum_rows(const Channels& l, const A* values, const S& summed, Finish& finish) {
  constexpr int N = S::kSums;
  std::vector<double> totals(N * l.channels);
  if (l.size) summed.rows(l, values, totals.data());
  for (int64_t c = 0; c < l.channels; ++c) {
    double own[N];
    for (int s = 0; s < N; ++s) own[s] = totals[s * l.channels + c];
    finish(c, own);
  }
}

// For each channel: the sums, whose terms may be written as they are added, then finish(c, sums).
template <class A, int V, class S, class Finish>
void sum_channels(const Channels& l, const A* values, const S& summed, Finish finish) {
  if (l.size == 0 || l.innermost()) return sum_rows<A>(l, values, summed, finish);
  const int64_t grain = std::max<int64_t>(1, kGrain / l.count());
  torch::stable::parallel_for(0, l.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Vec<A> at[V];
      double own[S::kSums];
      for (int v = 0; v < V; ++v) at[v] = broadcast(values[v * l.channels + c]);
      summed.channel(l, c, at, own);
      finish(c, own);
    }
  });
}

// For each channel: the sums, then finish(c, sums), which completes the channel's `values`
// ([V][channels]), then write(i, lanes, values) for its elements.
template <class A, int V, class S, class Finish, class Write>
void sum_then_write(const Channels& l, A* values, const S& summed, Finish finish, Write write) {
  constexpr int N = S::kSums;
  if (l.size == 0 || l.innermost()) {
    sum_rows<A>(l, values, summed, finish);
    for_row_blocks(l, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t r = first; r < last; ++r)
        for_vectors<A>(l.channels, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
          Vec<A> at[V];
          for (int v = 0; v < V; ++v) at[v] = load(values + v * l.channels + j, lanes);
          write(r * l.channels + j, lanes, at);
        });
    });
    return;
  }
  const auto of_channel = [&](int64_t c, Vec<A>* at) {
    for (int v = 0; v < V; ++v) at[v] = broadcast(values[v * l.channels + c]);
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / l.count());
  torch::stable::parallel_for(0, l.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Vec<A> at[V];
      double own[N];
      of_channel(c, at);
      summed.channel(l, c, at, own);
      finish(c, own);
      of_channel(c, at);
      for_blocks<A>(l, c, [&](int64_t, auto for_each) {
        for_each([&](int64_t i, auto lanes)
                     __attribute__((always_inline)) { write(i, lanes, at); });
      });
    }
  });
}

}  // namespace aigc_fast

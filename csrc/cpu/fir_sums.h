// The sums of FIR filters: one row along, or four rows of the result at a time.
#pragma once

#include <utility>
#include <vector>

#include <aigc_fast/vec.h>

namespace aigc_fast {

// Element `at` of what is read, times weight `weight`.
struct Tap {
  int64_t weight, at;
};
using Taps = std::vector<Tap>;

// to[i] = sum of from[at + i] * weights[weight] over the taps, in whole vectors up to `size`.
template <int N, class A>
AIGC_INLINE void sum_tile(const A* from, const Taps& taps, const A* weights, A* to) {
  Vec<A> sums[N] = {};
  for (const Tap tap : taps)
#pragma GCC unroll 4  // else the sums stay in memory; so below
    for (int n = 0; n < N; ++n)
      sums[n] += load(from + tap.at + n * kLanes<A>) * weights[tap.weight];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(to + n * kLanes<A>, sums[n]);
}
template <class A>
void sum_row(const A* from, const Taps& taps, const A* weights, int64_t size, A* to) {
  constexpr int lanes = kLanes<A>, kBatch = 4;
  int64_t i = 0;
  for (; i + (kBatch - 1) * lanes < size; i += kBatch * lanes)
    sum_tile<kBatch>(from + i, taps, weights, to + i);
  for (; i < size; i += lanes) sum_tile<1>(from + i, taps, weights, to + i);
}

// Rows of the result that are made at a time: what is loaded for one serves the others.
constexpr int kBlockRows = 4;
// Which of them read a row: [first, beyond), in the order in which the rows come.
constexpr std::pair<int, int> kReaders[] = {{0, 1}, {0, 2}, {0, 3}, {0, 4}, {1, 2},
                                            {1, 3}, {1, 4}, {2, 3}, {2, 4}, {3, 4}};
constexpr int kKinds = std::size(kReaders);

// The rows that a block of kBlockRows reads, by their readers: those of kind k end at ends[k].
// `weight` is that of the block's first row, and of each further row `step` less.
struct RowBlock {
  Taps rows;
  int64_t ends[kKinds], step;
};

// N vectors of the block's rows, which are `stride` apart: the sums of
// from[row.at + column.at] * weights[row.weight + column.weight].
template <int N, class A>
AIGC_INLINE void sum_block_tile(const A* from, const RowBlock& block, const Taps& columns,
                                const A* weights, A* to, int64_t stride) {
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[kBlockRows][N] = {};
  int64_t r = 0;
  const auto add = [&]<int kind>(std::integral_constant<int, kind>) __attribute__((always_inline)) {
    for (; r < block.ends[kind]; ++r)
      for (const Tap column : columns) {
        const A* at = from + block.rows[r].at + column.at;
        const A* weight = weights + block.rows[r].weight + column.weight;
        Vec<A> v[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) v[n] = load(at + n * lanes);
#pragma GCC unroll 4
        for (int m = kReaders[kind].first; m < kReaders[kind].second; ++m)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sums[m][n] += v[n] * weight[-m * block.step];
      }
  };
  [&]<int... kind>(std::integer_sequence<int, kind...>) __attribute__((always_inline)) {
    (add(std::integral_constant<int, kind>{}), ...);
  }(std::make_integer_sequence<int, kKinds>{});
#pragma GCC unroll 4
  for (int m = 0; m < kBlockRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(to + m * stride + n * lanes, sums[m][n]);
}
template <class A>
void sum_block(const A* from, const RowBlock& block, const Taps& columns, const A* weights,
               int64_t size, A* to, int64_t stride) {
  // Vectors at a time: with 32 registers there is room for the sums of four, else of two.
  constexpr int lanes = kLanes<A>, kBatch = kVectorBytes == 64 ? 4 : 2;
  int64_t i = 0;
  for (; i + (kBatch - 1) * lanes < size; i += kBatch * lanes)
    sum_block_tile<kBatch>(from + i, block, columns, weights, to + i, stride);
  for (; i < size; i += lanes) sum_block_tile<1>(from + i, block, columns, weights, to + i, stride);
}

}  // namespace aigc_fast

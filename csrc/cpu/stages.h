// Work in stages inside one parallel region.
//
// A parallel region costs 4 us to enter and a decoding step has a hundred stages of 10 us. So the
// threads enter once and take the items of one stage after another; between two stages they spin,
// for about 0.4 us. Whoever comes takes part: the work gets done by however many threads torch
// sends.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "tensor.h"

namespace aigc_fast {

class Stages {
 public:
  explicit Stages(int64_t count) : counters_(count) {}

  // Takes items of a stage until none is left, then waits for those that others have taken. A
  // thread that gets an item calls prepare() once before it. Nobody is past the stage then, so both
  // may read what earlier stages wrote and what later ones will overwrite.
  template <class Prepare, class Item>
  void run(int64_t stage, int64_t items, Prepare&& prepare, Item&& item) {
    Counter& counter = counters_[stage];
    bool prepared = false;
    for (int64_t i; (i = counter.taken.fetch_add(1, std::memory_order_relaxed)) < items;) {
      if (!std::exchange(prepared, true)) prepare();
      item(i);
      counter.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; counter.done.load(std::memory_order_acquire) < items; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr int kSpins =
      10000;  // about 0.1 ms: longer waits mean that a thread lost its core

  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0}, done{0};
  };

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  std::vector<Counter> counters_;
};

}  // namespace aigc_fast

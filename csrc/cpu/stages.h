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
  // count: stages; threads: how many are expected.
  Stages(int64_t count, int64_t threads)
      : threads_(threads), taken_(count * threads), done_(count) {}

  int64_t threads() const { return threads_; }
  // The number of a thread that comes.
  int64_t join() { return joined_.fetch_add(1, std::memory_order_relaxed) % threads_; }

  // The first item of a thread's own share.
  int64_t first(int64_t thread, int64_t items) const { return thread * items / threads_; }

  // Takes items of a stage until none is left, then calls meanwhile() and waits for those that
  // others have taken. A thread takes its own share in order, so that it reads on where it is, and
  // then what is left of the others'. If it gets an item it calls prepare() once before it. Nobody
  // is past the stage then, so both may read what earlier stages wrote and what later ones will
  // overwrite.
  template <class Prepare, class Item, class Meanwhile>
  void run(int64_t stage, int64_t thread, int64_t items, Prepare&& prepare, Item&& item,
           Meanwhile&& meanwhile) {
    bool prepared = false;
    for (int64_t k = 0; k < threads_; ++k) {
      const int64_t share = (thread + k) % threads_, end = first(share + 1, items);
      std::atomic<int64_t>& taken = taken_[stage * threads_ + share].value;
      for (int64_t i;
           (i = first(share, items) + taken.fetch_add(1, std::memory_order_relaxed)) < end;) {
        if (!std::exchange(prepared, true)) prepare();
        item(i);
        done_[stage].value.fetch_add(1, std::memory_order_release);
      }
    }
    meanwhile();
    for (int spins = 0; done_[stage].value.load(std::memory_order_acquire) < items; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  // About 0.1 ms: longer waits mean that a thread lost its core.
  static constexpr int kSpins = 10000;

  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  int64_t threads_;
  std::atomic<int64_t> joined_{0};
  std::vector<Counter> taken_, done_;
};

}  // namespace aigc_fast

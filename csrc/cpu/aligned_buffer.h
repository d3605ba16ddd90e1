// Memory for whole vectors.
#pragma once

#include <vector>

#include <aigc_fast/vec.h>

namespace aigc_fast {

// Zeros that begin at a multiple of a vector: one that spans two lines of the cache takes twice as
// long to load.
template <class A>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t elements = 0) { resize(elements); }
  void resize(int64_t elements) { memory_.resize((elements + kLanes<A> - 1) / kLanes<A>); }
  A* data() { return reinterpret_cast<A*>(memory_.data()); }

 private:
  struct One {
    Vec<A> zeros = {};
  };
  std::vector<One> memory_;
};

}  // namespace aigc_fast

// Memory for whole vectors.
#pragma once

#include <memory>
#include <new>
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
  void grow(int64_t elements) {
    if (elements > int64_t(memory_.size()) * kLanes<A>) resize(elements);
  }
  A* data() { return reinterpret_cast<A*>(memory_.data()); }

 private:
  struct One {
    Vec<A> zeros = {};
  };
  std::vector<One> memory_;
};

// The same of any content: what is written anyway need not be cleared.
template <class S>
class UnclearedBuffer {
 public:
  explicit UnclearedBuffer(int64_t elements)
      : memory_(static_cast<S*>(::operator new(elements * sizeof(S), kAlignment))) {}
  S* data() { return memory_.get(); }
  const S* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(S* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<S, Free> memory_;
};

}  // namespace aigc_fast

// Memory that outlives a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace aigc_fast {

// Blocks that a thread has used and will use again: new memory costs a page fault every 4 KB,
// which for a short convolution is half of its time.
class KeptMemory {
 public:
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
  };

  static Block take(size_t size) {
    auto& blocks = own().blocks_;
    size_t best = blocks.size();
    for (size_t i = 0; i < blocks.size(); ++i)
      if (blocks[i].size >= size && (best == blocks.size() || blocks[i].size < blocks[best].size))
        best = i;
    if (best == blocks.size()) return {::operator new(size, kAlignment), size};
    const Block found = blocks[best];
    blocks.erase(blocks.begin() + best);
    own().total_ -= found.size;
    return found;
  }

  // The oldest blocks go where there would be too many.
  static void give(Block block) {
    if (block.size > kMost) return ::operator delete(block.memory, kAlignment);
    KeptMemory& kept = own();
    kept.blocks_.push_back(block);
    kept.total_ += block.size;
    while (kept.total_ > kMost || kept.blocks_.size() > kCount) {
      kept.total_ -= kept.blocks_.front().size;
      ::operator delete(kept.blocks_.front().memory, kAlignment);
      kept.blocks_.erase(kept.blocks_.begin());
    }
  }

  ~KeptMemory() {
    for (const Block& block : blocks_) ::operator delete(block.memory, kAlignment);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr size_t kMost = 64 << 20, kCount = 16;

  static KeptMemory& own() {
    static thread_local KeptMemory kept;
    return kept;
  }

  std::vector<Block> blocks_;
  size_t total_ = 0;
};

// Elements of any content, which begin at a multiple of a line of the cache.
template <class S>
class KeptBuffer {
 public:
  explicit KeptBuffer(int64_t elements = 0)
      : block_(elements > 0 ? KeptMemory::take(elements * sizeof(S)) : KeptMemory::Block{}) {}
  KeptBuffer(KeptBuffer&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  KeptBuffer& operator=(KeptBuffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~KeptBuffer() {
    if (block_.memory) KeptMemory::give(block_);
  }

  S* data() { return static_cast<S*>(block_.memory); }
  const S* data() const { return static_cast<const S*>(block_.memory); }

 private:
  KeptMemory::Block block_;
};

}  // namespace aigc_fast

// Runs CUDA kernels on a CPU, to test their arithmetic and their indices without a GPU.
//
// Every CUDA thread is a fiber. It runs until it meets others (a barrier, a shuffle) and is resumed
// once all have arrived; who runs first is drawn by chance. Asynchronous copies happen when they
// are waited for, not before, and shared memory starts as NaN: a missing wait or barrier shows.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#define AIGC_FAST_CUDA_ON_CPU
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace on_cpu {

constexpr size_t kStack = 256 * 1024;

struct Copy {
  uint4* to;
  const void* from;
  bool valid;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::vector<std::vector<Copy>> groups{1};  // copies on their way; the last is still open
  int waiting_for = 0;  // 0: may run, 1: a warp's meeting, 2: a block's, 3: has returned
  float sent = 0;
  uint32_t a[4], b[2];  // a lane's parts of a product of matrices
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline std::mt19937 chance;

inline Fiber& self() { return fibers[current]; }
inline void wait_for(int whom) {
  self().waiting_for = whom;
  swapcontext(&self().context, &scheduler);
}
inline void entry() {
  body();
  self().waiting_for = 3;
  swapcontext(&self().context, &scheduler);
}

// Frees those in [begin, end) who wait for `whom`, if all are there. A thread that has returned
// never comes: meeting without it is an error, as it is on a GPU.
inline void release(size_t begin, size_t end, int whom) {
  for (size_t i = begin; i < end; ++i)
    if (fibers[i].waiting_for != whom) return;
  for (size_t i = begin; i < end; ++i) fibers[i].waiting_for = 0;
}

inline void run_block(unsigned block, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  for (Fiber& f : fibers) {
    f.groups.assign(1, {});
    f.waiting_for = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  blockIdx.x = block;
  for (;;) {
    std::vector<unsigned> ready;
    unsigned returned = 0;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].waiting_for == 0) ready.push_back(i);
      returned += fibers[i].waiting_for == 3;
    }
    if (returned == threads) return;
    if (ready.empty()) {
      std::fprintf(stderr, "block %u: threads wait for each other\n", block);
      std::abort();
    }
    std::shuffle(ready.begin(), ready.end(), chance);
    for (unsigned i : ready) {
      current = i;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    for (unsigned w = 0; w < threads; w += 32) release(w, w + 32, 1);
    release(0, threads, 2);
  }
}

// Memory that ends where a page that nobody may touch begins.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes), pages_((bytes + kPage - 1) / kPage * kPage) {
    void* at =
        mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + pages_, kPage, PROT_NONE))
      std::abort();
    begin_ = static_cast<char*>(at);
    std::memset(begin_, 0xff, pages_);  // NaN in every floating type
  }
  Guarded(const void* from, size_t bytes) : Guarded(bytes) {
    if (bytes > 0) std::memcpy(get(), from, bytes);  // from nowhere it may not be called
  }
  ~Guarded() { munmap(begin_, pages_ + kPage); }
  Guarded(const Guarded&) = delete;
  char* get() const { return begin_ + pages_ - bytes_; }

 private:
  static constexpr size_t kPage = 4096;
  size_t bytes_, pages_;
  char* begin_;
};
inline std::unique_ptr<Guarded> shared_memory;

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, int threads, size_t shared, const Args&... args) {
  for (int64_t block = 0; block < blocks; ++block) {
    shared_memory = std::make_unique<Guarded>(shared);
    run_block(block, threads, [&] { kernel(args...); });
  }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::wait_for(2); }
inline void __syncwarp() { on_cpu::wait_for(1); }
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  assert(mask == 0xffffffffu);
  const unsigned me = on_cpu::current;
  on_cpu::self().sent = value;
  on_cpu::wait_for(1);
  const float received = on_cpu::fibers[me ^ lane_mask].sent;
  on_cpu::wait_for(1);  // nobody sends again before all have read
  return received;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

namespace aigc_fast {

struct float2 {
  float x, y;
};
struct cuda_bf16 {
  uint16_t bits;
};
using cuda_fp16 = _Float16;

inline float to_float(float x) { return x; }
inline float to_float(cuda_bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline float to_float(cuda_fp16 x) { return x; }
inline float to_float(int8_t x) { return x; }
inline void from_float(float x, float* y) { *y = x; }
inline void from_float(float x, cuda_fp16* y) { *y = static_cast<cuda_fp16>(x); }
inline void from_float(float x, cuda_bf16* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y->bits = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16 : bits >> 16 | 0x40;
}
inline float2 half_pair(uint32_t bits) {
  cuda_fp16 halves[2];
  std::memcpy(halves, &bits, sizeof halves);
  return {halves[0], halves[1]};
}

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
template <class T>
uint32_t minus_pair(uint32_t a, uint32_t b, T) {
  T x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < 2; ++i) from_float(to_float(x[i]) - to_float(y[i]), &x[i]);
  std::memcpy(&a, x, sizeof a);
  return a;
}

// The sum of n terms as a tensor core forms it: each cut off at one bit below the last place of the
// largest, the sum cut off to fp32 (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores").
inline float cut_sum(const double* terms, int n) {
  double largest = 0, sum = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(terms[i])) return std::accumulate(terms, terms + n, 0.0);
    largest = std::max(largest, std::abs(terms[i]));
  }
  const double place = std::ldexp(1.0, std::ilogb(std::max(largest, 1e-300)) - 24);
  for (int i = 0; i < n; ++i) sum += std::trunc(terms[i] / place) * place;
  const float rounded = static_cast<float>(sum);
  return std::abs(rounded) > std::abs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

// T elements lie in each word of a and b; a row of a has 8 words.
template <class C, class T>
void add_product(C (&c)[4], const uint32_t (&a)[4], const uint32_t* b, T) {
  constexpr int kWord = 4 / sizeof(T);
  std::copy_n(a, 4, on_cpu::self().a);
  std::copy_n(b, 2, on_cpu::self().b);
  const unsigned me = on_cpu::current, warp = me / 32 * 32, lane = me % 32;
  on_cpu::wait_for(1);
  for (unsigned i = 0; i < 4; ++i) {
    double terms[8 * kWord + 1];
    terms[8 * kWord] = c[i];
    for (unsigned word = 0; word < 8; ++word) {
      const on_cpu::Fiber& of_a = on_cpu::fibers[warp + lane / 4 * 4 + word % 4];
      const on_cpu::Fiber& of_b = on_cpu::fibers[warp + (lane % 4 * 2 + i % 2) * 4 + word % 4];
      T x[kWord], y[kWord];
      std::memcpy(x, &of_a.a[word / 4 * 2 + i / 2], 4);
      std::memcpy(y, &of_b.b[word / 4], 4);
      for (int k = 0; k < kWord; ++k)
        terms[word * kWord + k] = static_cast<double>(to_float(x[k])) * to_float(y[k]);
    }
    if constexpr (std::is_same_v<C, int>)
      c[i] = static_cast<int>(std::accumulate(terms, terms + 8 * kWord + 1, 0.0));
    else
      c[i] = cut_sum(terms, 8 * kWord + 1);
  }
  on_cpu::wait_for(1);
}

inline uint4* dynamic_shared() { return reinterpret_cast<uint4*>(on_cpu::shared_memory->get()); }

inline void copy_async(uint4* to, const void* from, bool valid) {
  assert(reinterpret_cast<uintptr_t>(to) % 16 == 0);
  assert(reinterpret_cast<uintptr_t>(from) % 16 == 0);
  on_cpu::self().groups.back().push_back({to, from, valid});
}
inline void commit_copies() { on_cpu::self().groups.emplace_back(); }
template <int pending>
void wait_copies() {
  auto& groups = on_cpu::self().groups;
  while (groups.size() > pending + 1) {  // the open group does not count
    for (const on_cpu::Copy& c : groups.front()) {
      if (c.valid)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace aigc_fast

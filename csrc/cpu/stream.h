// Stores that leave the caches alone.
//
// A line that is written as usual is read first, though all of it is overwritten, and another one
// leaves the cache for it. Streaming saves that, but a core streams no more than some 8 GB/s: it
// pays where twice as much is read as written, and where results are too large for the next
// operator to find them in the cache. Not on Intel's processors, where it has not been measured.
#pragma once

#include "tensor.h"
#include "two_vectors.h"

#if defined(__AVX512F__)
#include <aigc_fast/cpu_features.h>
#endif

namespace aigc_fast {

// From here on a result that is read at once by an addition comes sooner all the same: at 6 MB the
// two take 10% less time, at 12 MB 20%; at 3 MB 5% more.
constexpr int64_t kStreamBytes = 4 << 20;

// Whether rows of this width may be streamed to `to`, a contiguous tensor; `elements`: of all
// results that are written before the first of them is read.
template <class T>
bool may_stream(const Tensor& to, int64_t width, int64_t elements) {
#if defined(__AVX512F__)
  static const bool pays = !cpu_features()["intel"];
  const bool lines =
      reinterpret_cast<uintptr_t>(data<T>(to)) % 64 == 0 && width * sizeof(T) % 64 == 0;
  return pays && lines && elements * int64_t{sizeof(T)} >= kStreamBytes;
#else
  return false;  // two vectors of bf16 are no whole line
#endif
}
template <class T>
bool may_stream(const Tensor& to, int64_t width) {
  return may_stream<T>(to, width, to.numel());
}

// store_two where may_stream.
template <class T, class N>
AIGC_INLINE void stream_two(T* p, const Vectors<Acc<T>, 2>& v, N lanes) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<N, TwoVectors<Acc<T>>>) {
    __m512i lines[2 * kLanes<Acc<T>> * sizeof(T) / 64];
    store_two(reinterpret_cast<T*>(lines), v, lanes);
    __m512i* to = reinterpret_cast<__m512i*>(p);
    for (const __m512i& line : lines) _mm512_stream_si512(to++, line);
    return;
  }
#endif
  store_two(p, v, lanes);
}

// Makes what was streamed visible to other threads.
inline void end_of_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace aigc_fast

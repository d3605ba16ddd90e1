// A matrix to memory of the other order, blocks of vectors at a time.
#pragma once

#include "vector_pair.h"

namespace aigc_fast {

template <class S, class T>
AIGC_INLINE void copy_one(S* to, const T* from) {
  if constexpr (std::is_same_v<S, T>)
    *to = *from;
  else
    store_one(to, load_one(from));
}

// A vector of S for each vector of T: 16-bit numbers that stay what they are move as integers.
template <class S, class T>
struct Mover {
  static constexpr int kLanes = aigc_fast::kLanes<Acc<T>>;
  static constexpr bool kBits = std::is_same_v<S, T> && sizeof(T) == 2;
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef int32_t Wide __attribute__((vector_size(kVectorBytes)));

  AIGC_INLINE static auto get(const T* p) {
    if constexpr (kBits) {
      Narrow v;
      std::memcpy(&v, p, sizeof v);
      return __builtin_convertvector(v, Wide);
    } else {
      return load(p);
    }
  }
  template <class V>
  AIGC_INLINE static void put(S* p, V v) {
    if constexpr (kBits) {
      const Narrow narrow = __builtin_convertvector(v, Narrow);
      std::memcpy(static_cast<void*>(p), &narrow, sizeof narrow);
    } else {
      store(p, v);
    }
  }
};

// to[i * to_pitch + j] = from[j * from_pitch + i] for i < rows and j < columns.
template <class S, class T>
void copy_transposed(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, S* to,
                     int64_t to_pitch) {
  using M = Mover<S, T>;
  constexpr int64_t L = M::kLanes;
  int64_t j = 0;
  for (; j + L <= columns; j += L) {
    int64_t i = 0;
    for (; i + L <= rows; i += L) {
      decltype(M::get(from)) block[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k] = M::get(from + (j + k) * from_pitch + i);
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) M::put(to + (i + k) * to_pitch + j, block[k]);
    }
    for (; i < rows; ++i)
      for (int64_t k = j; k < j + L; ++k)
        copy_one(to + i * to_pitch + k, from + k * from_pitch + i);
  }
  for (; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) copy_one(to + i * to_pitch + j, from + j * from_pitch + i);
}

}  // namespace aigc_fast

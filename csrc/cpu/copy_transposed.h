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

// A column of T as a vector of S.
template <class S, class T>
struct OneColumn {
  static constexpr int64_t kColumns = 1, kLanes = aigc_fast::kLanes<Acc<T>>;
  static constexpr bool kBits = std::is_same_v<S, T> && sizeof(T) == 2;  // they move as integers
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));

  AIGC_INLINE static auto get(const T* p, int64_t) {
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

// Two columns of 16 bits, which move as words.
template <class T>
struct TwoColumns : OneColumn<T, T> {
  static constexpr int64_t kColumns = 2;

  AIGC_INLINE static auto get(const T* p, int64_t pitch) {
    return OneColumn<T, T>::get(p, pitch) | OneColumn<T, T>::get(p + pitch, pitch) << 16;
  }
  template <class V>
  AIGC_INLINE static void put(T* p, V v) {
    std::memcpy(static_cast<void*>(p), &v, sizeof v);
  }
};

// The columns from j on that fill blocks of How; returns the first that does not.
template <class How, class S, class T>
int64_t transpose_blocks(const T* from, int64_t from_pitch, int64_t rows, int64_t j,
                         int64_t columns, S* to, int64_t to_pitch) {
  constexpr int64_t L = How::kLanes, C = How::kColumns;
  for (; j + C * L <= columns; j += C * L) {
    int64_t i = 0;
    for (; i + L <= rows; i += L) {
      decltype(How::get(from, 0)) block[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k)
        block[k] = How::get(from + (j + C * k) * from_pitch + i, from_pitch);
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) How::put(to + (i + k) * to_pitch + j, block[k]);
    }
    for (; i < rows; ++i)
      for (int64_t k = j; k < j + C * L; ++k)
        copy_one(to + i * to_pitch + k, from + k * from_pitch + i);
  }
  return j;
}

// to[i * to_pitch + j] = from[j * from_pitch + i] for i < rows and j < columns.
template <class S, class T>
void copy_transposed(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, S* to,
                     int64_t to_pitch) {
  int64_t j = 0;
  if constexpr (OneColumn<S, T>::kBits)
    j = transpose_blocks<TwoColumns<T>>(from, from_pitch, rows, j, columns, to, to_pitch);
  j = transpose_blocks<OneColumn<S, T>>(from, from_pitch, rows, j, columns, to, to_pitch);
  for (; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) copy_one(to + i * to_pitch + j, from + j * from_pitch + i);
}

}  // namespace aigc_fast

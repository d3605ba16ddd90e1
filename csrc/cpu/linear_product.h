// y = x @ weight^T + bias of matrices of any two strides of which one is 1 (linear.cpp,
// grouped_linear.cpp).
//
// A block of the weight is packed so that the columns of a tile, whose sums stay in registers, lie
// side by side for each term, or for each pair of terms of bf16. Every kTerms terms the sums join
// those in memory: short chains of additions round less, and a packed block stays in the second
// cache. What is summed in which order is the same for any number of threads.
#pragma once

#include "copy_transposed.h"
#include "kept_buffer.h"
#include "linear_few_rows.h"

namespace aigc_fast {

// One of the strides is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  static Matrix of(const Tensor& x) {
    return {aigc_fast::data<T>(x), x.size(0), x.size(1), x.stride(0), x.stride(1)};
  }
  Matrix some_rows(int64_t first, int64_t count) const {
    return {at(first, 0), count, columns, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }

  const T* at(int64_t row, int64_t column) const {
    return data + row * row_stride + column * column_stride;
  }
  // to[i * pitch + j] of the rows row + i and the columns column + j.
  template <class S>
  void take(int64_t row, int64_t count, int64_t column, int64_t width, S* to, int64_t pitch) const {
    copy(at(row, column), count, row_stride, width, column_stride, to, pitch);
  }
  // to[j * pitch + i] of the same.
  template <class S>
  void take_transposed(int64_t row, int64_t count, int64_t column, int64_t width, S* to,
                       int64_t pitch) const {
    copy(at(row, column), width, column_stride, count, row_stride, to, pitch);
  }

 private:
  template <class S>
  void copy(const T* from, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride,
            S* to, int64_t pitch) const {
    if (inner_stride != 1) return copy_transposed(from, inner_stride, outer, inner, to, pitch);
    for (; outer > 0; --outer, from += outer_stride, to += pitch) {
      if constexpr (std::is_same_v<S, T>)
        std::copy_n(from, inner, to);
      else
        convert(from, inner, to);
    }
  }
};

// The numbers that are multiplied are S.
template <class T, class S>
class Product {
 public:
  Product(const Matrix<T>& x, const Matrix<T>& weight, const float* bias, T* y)
      : x_(x), weight_(weight), bias_(bias), y_(y) {}

  void run() const {
    if (x_.rows <= kFew && x_.column_stride == 1 && weight_.column_stride == 1)
      return multiply_few_rows();
    const int64_t threads = torch::stable::get_num_threads();
    int64_t column_parts = parts(weight_.rows, kColumns), row_parts = parts(x_.rows, kRows);
    // As many for each thread, but for a tenth.
    auto uneven = [&] {
      const int64_t items = row_parts * column_parts;
      return 10 * (parts(items, threads) * threads - items) > items;
    };
    while (uneven() && x_.rows / row_parts >= 2 * kLeastRows) ++row_parts;
    while (uneven() && column_parts < parts(weight_.rows, kGroup)) ++column_parts;
    in_parallel(row_parts * column_parts, kGrain, [&](int64_t i) {
      const int64_t row = i / column_parts, column = i % column_parts;
      multiply(edge(x_.rows, row, row_parts, kTileRows),
               edge(x_.rows, row + 1, row_parts, kTileRows),
               edge(weight_.rows, column, column_parts, kGroup),
               edge(weight_.rows, column + 1, column_parts, kGroup));
    });
  }

 private:
  static constexpr int64_t kStep = std::is_same_v<S, bf16> ? 2 : 1;  // terms in one instruction
  static constexpr int64_t kTerms = 256 * kStep;
  // Rows of x for which the weight is not packed, and those of them at a time.
  static constexpr int64_t kFewRows = 4 * kStep, kFew = 2 * kFewRows;
  // Of a block of sums, which stays in the second cache, and those below which a block of the
  // weight is not worth packing once more.
  static constexpr int64_t kColumns = 4 * kGroup, kRows = 512, kLeastRows = 64;
  // Rows of x that are copied at a time where they are not read where they are.
  static constexpr int64_t kTaken = 4 * kTileRows;

  static int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }
  // Where a part begins, a multiple of `unit`.
  static int64_t edge(int64_t size, int64_t part, int64_t parts, int64_t unit) {
    const int64_t units = (size + unit - 1) / unit;
    return std::min(size, units * part / parts * unit);
  }

  void multiply(int64_t row, int64_t last_row, int64_t column, int64_t last_column) const {
    const int64_t rows = last_row - row, columns = last_column - column;
    T* y = y_ + row * weight_.rows + column;
    if constexpr (std::is_same_v<T, float>) {
      sum(row, rows, column, columns, y, weight_.rows);
    } else {
      KeptBuffer<float> sums(rows * columns);
      sum(row, rows, column, columns, sums.data(), columns);
      for (int64_t r = 0; r < rows; ++r)
        convert(sums.data() + r * columns, columns, y + r * weight_.rows);
    }
  }

  void sum(int64_t row, int64_t rows, int64_t column, int64_t columns, float* to,
           int64_t pitch) const {
    const int64_t groups = parts(columns, kGroup);
    KeptBuffer<S> packed(groups * kGroup * kTerms), taken(kTaken * kTerms);
    for (int64_t term = 0; term < weight_.columns; term += kTerms) {
      const int64_t terms = std::min(kTerms, weight_.columns - term);
      auto width = [&](int64_t group) { return std::min(kGroup, columns - group * kGroup); };
      auto weights = [&](int64_t group) { return packed.data() + group * kGroup * kTerms; };
      for (int64_t g = 0; g < groups; ++g)
        pack(column + g * kGroup, width(g), term, terms, weights(g));
      for (int64_t r = 0; r < rows; r += kTaken) {
        const int64_t count = std::min(kTaken, rows - r);
        const auto [x, x_pitch] = some_rows(row + r, count, term, terms, taken.data());
        for (int64_t i = 0; i < count; i += kTileRows)
          for (int64_t g = 0; g < groups; ++g)
            multiply_rows<kTileRows>(std::min<int64_t>(kTileRows, count - i), x + i * x_pitch,
                                     x_pitch, terms, weights(g),
                                     {to + (r + i) * pitch + g * kGroup, pitch, width(g), term > 0,
                                      bias_ ? bias_ + column + g * kGroup : nullptr});
      }
    }
  }

  // As multiply_tile reads them: [term][kGroup], zero beyond the last column.
  void pack(int64_t column, int64_t count, int64_t term, int64_t terms, float* to) const {
    weight_.take_transposed(column, count, term, terms, to, kGroup);
    for (int64_t t = 0; count < kGroup && t < terms; ++t)
      std::fill(to + t * kGroup + count, to + (t + 1) * kGroup, 0.0f);
  }
#if AIGC_BF16_DOT
  void pack(int64_t column, int64_t count, int64_t term, int64_t terms, bf16* to) const {
    // Pairs of neighbours move as words.
    const bf16* from = weight_.at(column, term);
    const bool words = reinterpret_cast<uintptr_t>(from) % 4 == 0 && weight_.row_stride % 2 == 0;
    if (words && weight_.column_stride == 1 && terms % 2 == 0 && count == kGroup)
      return copy_transposed(reinterpret_cast<const float*>(from), weight_.row_stride / 2,
                             terms / 2, count, reinterpret_cast<float*>(to), kGroup);
    // A row of the columns for each term, and one of zeros.
    const bool in_place = weight_.row_stride == 1 && count == kGroup;
    KeptBuffer<bf16> rows((kTerms + 1) * kGroup);
    bf16* zero = rows.data() + kTerms * kGroup;
    if (!in_place) {
      std::fill_n(rows.data(), terms * kGroup, bf16{});
      weight_.take_transposed(column, count, term, terms, rows.data(), kGroup);
    }
    std::fill_n(zero, kGroup, bf16{});
    const auto row = [&](int64_t t) {
      return t == terms ? zero : in_place ? weight_.at(column, term + t) : rows.data() + t * kGroup;
    };
    for (int64_t t = 0; t < terms; t += 2, to += 2 * kGroup)
      pair_steps(row(t), row(t + 1), kGroup, to);
  }
#endif

  // The weight is read once, where it is (linear_few_rows.h).
  void multiply_few_rows() const {
    in_parallel(parts(weight_.rows, kFewColumns), kFewColumns * weight_.columns, [&](int64_t i) {
      const int64_t column = i * kFewColumns;
      for (int64_t row = 0; row < x_.rows; row += kFewRows)
        multiply_few_rows<kFewRows>(row, column, std::min(kFewColumns, weight_.rows - column));
    });
  }
  // P rows of x from `row` on, or the fewer that there are.
  template <int P>
  void multiply_few_rows(int64_t row, int64_t column, int64_t count) const {
    if constexpr (P > 1)
      if (x_.rows - row < P) return multiply_few_rows<P - 1>(row, column, count);
    const int64_t terms = weight_.columns;
    KeptBuffer<S> taken(std::is_same_v<S, T> ? 0 : P * terms);
    const S* x = taken.data();
    int64_t pitch = terms;
    if constexpr (std::is_same_v<S, T>)
      x = x_.at(row, 0), pitch = x_.row_stride;
    else
      x_.take(row, P, 0, terms, taken.data(), terms);
    float sums[P][kFewColumns];
    for (int64_t j = 0; j < count; ++j)
      multiply_few<P>(x, pitch, weight_.at(column + j, 0), terms, &sums[0][j], kFewColumns);
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t i = 0; bias_ && i < count; ++i) sums[p][i] += bias_[column + i];
      convert(sums[p], count, y_ + (row + p) * weight_.rows + column);
    }
  }

  // Rows of x, where they are or in `taken`, and how far they lie apart.
  std::pair<const S*, int64_t> some_rows(int64_t row, int64_t count, int64_t term, int64_t terms,
                                         S* taken) const {
    if constexpr (std::is_same_v<S, T>)
      if (x_.column_stride == 1 && terms % kStep == 0) return {x_.at(row, term), x_.row_stride};
    x_.take(row, count, term, terms, taken, kTerms);
    for (int64_t r = 0; terms % kStep != 0 && r < count; ++r) taken[r * kTerms + terms] = S{};
    return {taken, kTerms};
  }

  const Matrix<T> x_, weight_;
  const float* bias_;
  T* y_;
};

inline Tensor with_a_unit_stride(const Tensor& x) {
  return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// Calls f(type) with the type in which numbers of T are multiplied.
template <class T, class F>
void with_factor_type(F&& f) {
#if AIGC_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>)
    if (has_bf16_dot()) return f(std::type_identity<T>{});
#endif
  f(std::type_identity<float>{});
}

}  // namespace aigc_fast

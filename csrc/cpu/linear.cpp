// y = x @ weight^T + bias in float32, for processors on which torch's library leaves AVX-512
// unused.
//
// A block of the weight is packed so that the outputs of a tile, rows times vectors of columns that
// stay in registers, lie side by side for each term; rows of x are read where they are. Every
// kTerms terms the tile goes to y and comes back: short chains of additions round less, and a
// packed block stays in the second cache. What is summed in which order is the same for any number
// of threads.
#include "copy_transposed.h"
#include "kept_buffer.h"
#include "tensor.h"

namespace aigc_fast {
namespace {

// One of the strides is 1.
struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const Tensor& x)
      : data(aigc_fast::data<float>(x)),
        rows(x.size(0)),
        columns(x.size(1)),
        row_stride(x.stride(0)),
        column_stride(x.stride(1)) {}

  // to[column * pitch + row] of a block.
  void transpose(int64_t row, int64_t count, int64_t column, int64_t width, float* to,
                 int64_t pitch) const {
    copy(row, count, row_stride, column, width, column_stride, to, pitch);
  }
  // to[row * pitch + column].
  void take(int64_t row, int64_t count, int64_t column, int64_t width, float* to,
            int64_t pitch) const {
    copy(column, width, column_stride, row, count, row_stride, to, pitch);
  }

 private:
  // to[i * pitch + j] for `outer` indices i and `inner` indices j.
  void copy(int64_t j, int64_t inner, int64_t inner_stride, int64_t i, int64_t outer,
            int64_t outer_stride, float* to, int64_t pitch) const {
    const float* from = data + i * outer_stride + j * inner_stride;
    if (inner_stride != 1) return copy_transposed(from, inner_stride, outer, inner, to, pitch);
    for (int64_t k = 0; k < outer; ++k, from += outer_stride, to += pitch) convert(from, inner, to);
  }
};

class Product {
 public:
  Product(const Matrix& x, const Matrix& weight, const float* bias, float* y)
      : x_(x), weight_(weight), bias_(bias), y_(y) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t column_parts = parts(weight_.rows, kColumns);
    int64_t row_parts = parts(x_.rows, kRows);
    // As many for each thread, but for a tenth.
    auto uneven = [&] {
      const int64_t items = row_parts * column_parts;
      return 10 * (parts(items, threads) * threads - items) > items;
    };
    while (uneven() && x_.rows / row_parts >= 2 * kFewRows) ++row_parts;
    in_parallel(row_parts * column_parts, kGrain, [&](int64_t i) {
      const int64_t row = i / column_parts, column = i % column_parts;
      multiply(edge(x_.rows, row, row_parts, kTileRows),
               edge(x_.rows, row + 1, row_parts, kTileRows),
               edge(weight_.rows, column, column_parts, kGroup),
               edge(weight_.rows, column + 1, column_parts, kGroup));
    });
  }

 private:
  static constexpr int64_t L = kLanes<float>;
  // A tile: all but a few of the registers.
  static constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4, kVectors = 3;
  static constexpr int64_t kGroup = kVectors * L;
  static constexpr int64_t kTerms = 256;
  // Rows that are transposed at a time where x has its terms apart.
  static constexpr int64_t kTaken = 2 * kTileRows;
  // Of a block of y, which stays in the second cache, and those below which a block of the weight
  // is not worth packing once more.
  static constexpr int64_t kColumns = 4 * kGroup, kRows = 512, kFewRows = 64;

  static int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }
  // Where a part begins, a multiple of `unit`.
  static int64_t edge(int64_t size, int64_t part, int64_t parts, int64_t unit) {
    const int64_t units = (size + unit - 1) / unit;
    return std::min(size, units * part / parts * unit);
  }

  void multiply(int64_t row, int64_t last_row, int64_t column, int64_t last_column) const {
    const int64_t groups = parts(last_column - column, kGroup);
    KeptBuffer<float> packed(groups * kGroup * kTerms), rows(kTaken * kTerms);
    for (int64_t term = 0; term < weight_.columns; term += kTerms) {
      const int64_t terms = std::min(kTerms, weight_.columns - term);
      for (int64_t g = 0; g < groups; ++g)
        pack(column + g * kGroup, std::min(kGroup, last_column - column - g * kGroup), term, terms,
             packed.data() + g * kGroup * terms);
      for (int64_t r = row; r < last_row; r += kTaken) {
        const int64_t count = std::min(kTaken, last_row - r);
        const float* from = x_.data + r * x_.row_stride + term;
        int64_t pitch = x_.row_stride;
        if (x_.column_stride != 1) {
          x_.take(r, count, term, terms, rows.data(), kTerms);
          from = rows.data(), pitch = kTerms;
        }
        for (int64_t i = 0; i < count; i += kTileRows)
          for (int64_t g = 0; g < groups; ++g)
            some_rows<kTileRows>(std::min<int64_t>(kTileRows, count - i), from + i * pitch, pitch,
                                 terms, packed.data() + g * kGroup * terms, term > 0, r + i,
                                 column + g * kGroup,
                                 std::min(kGroup, last_column - column - g * kGroup));
      }
    }
  }

  // [term][kGroup], zero beyond the last column.
  void pack(int64_t column, int64_t count, int64_t term, int64_t terms, float* to) const {
    weight_.transpose(column, count, term, terms, to, kGroup);
    for (int64_t t = 0; count < kGroup && t < terms; ++t)
      std::fill(to + t * kGroup + count, to + (t + 1) * kGroup, 0.0f);
  }

  // As many rows as `count` says, P or fewer.
  template <int P>
  void some_rows(int64_t count, const float* x, int64_t pitch, int64_t terms, const float* w,
                 bool more, int64_t row, int64_t column, int64_t columns) const {
    if (count >= P) {
      const int64_t vectors = parts(columns, L);
      auto tile = vectors == 1   ? &Product::tile<P, 1>
                  : vectors == 2 ? &Product::tile<P, 2>
                                 : &Product::tile<P, kVectors>;
      (this->*tile)(x, pitch, terms, w, more, row, column, columns);
      count -= P, x += P * pitch, row += P;
    }
    if constexpr (P > 1)
      if (count > 0) some_rows<P / 2>(count, x, pitch, terms, w, more, row, column, columns);
  }

  // The products of P rows and V vectors of columns: added to y, or where it has none, to the bias.
  // They are summed first, or all terms would be one chain.
  template <int P, int V>
  __attribute__((noinline)) void tile(const float* x, int64_t pitch, int64_t terms, const float* w,
                                      bool more, int64_t row, int64_t column,
                                      int64_t columns) const {
    const int64_t y_pitch = weight_.rows;
    float* y = y_ + row * y_pitch + column;
    const int64_t lanes = columns - (V - 1) * L;  // of the last vector
    Vec<float> sums[P][V] = {};
#pragma GCC unroll 2
    for (int64_t t = 0; t < terms; ++t, w += kGroup) {
      Vec<float> weights[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) weights[v] = load(w + v * L);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sums[p][v] += x[p * pitch + t] * weights[v];
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        float* to = y + p * y_pitch + v * L;
        const float* start = more ? to : bias_ ? bias_ + column + v * L : nullptr;
        if (v < V - 1 || lanes >= L)
          store(to, start ? load(start) + sums[p][v] : sums[p][v]);
        else
          store_n(to, start ? load_n(start, lanes) + sums[p][v] : sums[p][v], lanes);
      }
  }

  const Matrix &x_, &weight_;
  const float* bias_;
  float* y_;
};

Tensor with_a_unit_stride(const Tensor& x) {
  return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor linear_product(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias_in) {
  require(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(1),
          "x must be (rows, in_features) and weight (out_features, in_features)");
  for (const Tensor* t : {&x_in, &weight_in})
    require(t->scalar_type() == ScalarType::Float, "x and weight must be float32");
  const Tensor x = with_a_unit_stride(x_in), weight = with_a_unit_stride(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) {
    require(bias_in->dim() == 1 && bias_in->size(0) == weight.size(0) &&
                bias_in->scalar_type() == ScalarType::Float,
            "bias must be float32 of shape (out_features,)");
    bias = as_contiguous(*bias_in);
  }
  Tensor y = empty({x.size(0), weight.size(0)}, ScalarType::Float);
  require(x.size(1) > 0, "x must have features");
  if (y.numel() == 0) return y;
  Product(Matrix(x), Matrix(weight), bias ? data<float>(*bias) : nullptr, mutable_data<float>(y))
      .run();
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&linear_product));
}

}  // namespace
}  // namespace aigc_fast

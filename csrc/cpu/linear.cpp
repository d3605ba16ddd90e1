// y = x @ weight^T + bias where torch's own products are slow: float32 by a library that leaves
// AVX-512 unused, 16-bit numbers on processors without instructions for them.
//
// A block of the weight is packed so that the columns of a tile, whose sums stay in registers, lie
// side by side for each term. Every kTerms terms the sums join those in memory: short chains of
// additions round less, and a packed block stays in the second cache. What is summed in which order
// is the same for any number of threads.
#include "copy_transposed.h"
#include "kept_buffer.h"
#include "tensor.h"

namespace aigc_fast {
namespace {

// One of the strides is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const Tensor& x)
      : data(aigc_fast::data<T>(x)),
        rows(x.size(0)),
        columns(x.size(1)),
        row_stride(x.stride(0)),
        column_stride(x.stride(1)) {}

  // to[i * pitch + j] of the rows row + i and the columns column + j.
  void take(int64_t row, int64_t count, int64_t column, int64_t width, float* to,
            int64_t pitch) const {
    copy(row, count, row_stride, column, width, column_stride, to, pitch);
  }
  // to[j * pitch + i] of the same.
  void take_transposed(int64_t row, int64_t count, int64_t column, int64_t width, float* to,
                       int64_t pitch) const {
    copy(column, width, column_stride, row, count, row_stride, to, pitch);
  }

 private:
  void copy(int64_t i, int64_t outer, int64_t outer_stride, int64_t j, int64_t inner,
            int64_t inner_stride, float* to, int64_t pitch) const {
    const T* from = data + i * outer_stride + j * inner_stride;
    if (inner_stride != 1) return copy_transposed(from, inner_stride, outer, inner, to, pitch);
    for (; outer > 0; --outer, from += outer_stride, to += pitch) convert(from, inner, to);
  }
};

// Where the sums of a tile go, `pitch` between rows: they are added to what is there, or, the first
// ones, to a bias.
struct Sums {
  float* data;
  int64_t pitch, columns;
  bool more;
  const float* bias;
};

constexpr int64_t L = kLanes<float>;
// A tile: all but a few of the registers.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4, kVectors = 3;
constexpr int64_t kGroup = kVectors * L;

// The products of P rows of x and V vectors of columns, [term][kGroup].
template <int P, int V>
__attribute__((noinline)) void multiply_tile(const float* x, int64_t pitch, int64_t terms,
                                             const float* w, const Sums& to) {
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
  const int64_t lanes = to.columns - (V - 1) * L;  // of the last vector
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* y = to.data + p * to.pitch + v * L;
      const float* start = to.more ? y : to.bias ? to.bias + v * L : nullptr;
      if (v < V - 1 || lanes >= L)
        store(y, start ? load(start) + sums[p][v] : sums[p][v]);
      else
        store_n(y, start ? load_n(start, lanes) + sums[p][v] : sums[p][v], lanes);
    }
}

// The same of `rows` rows, P or fewer.
template <int P>
void multiply_rows(int64_t rows, const float* x, int64_t pitch, int64_t terms, const float* w,
                   Sums to) {
  if (rows >= P) {
    const auto multiply = to.columns <= L       ? &multiply_tile<P, 1>
                          : to.columns <= 2 * L ? &multiply_tile<P, 2>
                                                : &multiply_tile<P, kVectors>;
    multiply(x, pitch, terms, w, to);
    rows -= P, x += P * pitch, to.data += P * to.pitch;
  }
  if constexpr (P > 1)
    if (rows > 0) multiply_rows<P / 2>(rows, x, pitch, terms, w, to);
}

template <class T>
class Product {
 public:
  Product(const Tensor& x, const Tensor& weight, const float* bias, T* y)
      : x_(x), weight_(weight), bias_(bias), y_(y) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t column_parts = parts(weight_.rows, kColumns), row_parts = parts(x_.rows, kRows);
    // As many for each thread, but for a tenth.
    auto uneven = [&] {
      const int64_t items = row_parts * column_parts;
      return 10 * (parts(items, threads) * threads - items) > items;
    };
    while (uneven() && x_.rows / row_parts >= 2 * kFewRows) ++row_parts;
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
  static constexpr int64_t kTerms = 256;
  // Of a block of sums, which stays in the second cache, and those below which a block of the
  // weight is not worth packing once more.
  static constexpr int64_t kColumns = 4 * kGroup, kRows = 512, kFewRows = 64;
  // Rows of x that are copied at a time where they are not read where they are.
  static constexpr int64_t kTaken = 2 * kTileRows;
  static constexpr bool kWide = std::is_same_v<T, float>;

  static int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }
  // Where a part begins, a multiple of `unit`.
  static int64_t edge(int64_t size, int64_t part, int64_t parts, int64_t unit) {
    const int64_t units = (size + unit - 1) / unit;
    return std::min(size, units * part / parts * unit);
  }

  void multiply(int64_t row, int64_t last_row, int64_t column, int64_t last_column) const {
    const int64_t rows = last_row - row, columns = last_column - column;
    T* y = y_ + row * weight_.rows + column;
    if constexpr (kWide) return sum(row, rows, column, columns, y, weight_.rows);
    KeptBuffer<float> sums(rows * columns);
    sum(row, rows, column, columns, sums.data(), columns);
    for (int64_t r = 0; r < rows; ++r)
      convert(sums.data() + r * columns, columns, y + r * weight_.rows);
  }

  void sum(int64_t row, int64_t rows, int64_t column, int64_t columns, float* to,
           int64_t pitch) const {
    const int64_t groups = parts(columns, kGroup);
    KeptBuffer<float> packed(groups * kGroup * kTerms), taken(kTaken * kTerms);
    for (int64_t term = 0; term < weight_.columns; term += kTerms) {
      const int64_t terms = std::min(kTerms, weight_.columns - term);
      auto width = [&](int64_t group) { return std::min(kGroup, columns - group * kGroup); };
      auto weights = [&](int64_t group) { return packed.data() + group * kGroup * terms; };
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

  // [term][kGroup], zero beyond the last column.
  void pack(int64_t column, int64_t count, int64_t term, int64_t terms, float* to) const {
    weight_.take_transposed(column, count, term, terms, to, kGroup);
    for (int64_t t = 0; count < kGroup && t < terms; ++t)
      std::fill(to + t * kGroup + count, to + (t + 1) * kGroup, 0.0f);
  }

  // Rows of x, where they are or in `taken`, and how far they lie apart.
  std::pair<const float*, int64_t> some_rows(int64_t row, int64_t count, int64_t term,
                                             int64_t terms, float* taken) const {
    if constexpr (kWide)
      if (x_.column_stride == 1) return {x_.data + row * x_.row_stride + term, x_.row_stride};
    x_.take(row, count, term, terms, taken, kTerms);
    return {taken, kTerms};
  }

  const Matrix<T> x_, weight_;
  const float* bias_;
  T* y_;
};

Tensor with_a_unit_stride(const Tensor& x) {
  return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor linear_product(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias_in) {
  require(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(1),
          "x must be (rows, in_features) and weight (out_features, in_features)");
  require(x_in.size(1) > 0, "x must have features");
  require(weight_in.scalar_type() == x_in.scalar_type(), "weight must have the dtype of x");
  const Tensor x = with_a_unit_stride(x_in), weight = with_a_unit_stride(weight_in);
  const int64_t columns = weight.size(0);
  Tensor y = empty({x.size(0), columns}, x.scalar_type());
  if (y.numel() == 0) return y;
  dispatch(x, "x", [&]<class T>(T) {
    if constexpr (std::is_same_v<T, double>) {
      require(false, "x must be float32, bfloat16 or float16");
    } else {
      std::vector<float> bias;
      if (bias_in) {
        require(bias_in->dim() == 1 && bias_in->size(0) == columns &&
                    bias_in->scalar_type() == x.scalar_type(),
                "bias must have shape (out_features,) and the dtype of x");
        bias.resize(columns);
        convert(data<T>(as_contiguous(*bias_in)), columns, bias.data());
      }
      Product<T>(x, weight, bias_in ? bias.data() : nullptr, mutable_data<T>(y)).run();
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&linear_product));
}

}  // namespace
}  // namespace aigc_fast

// y = x @ weight.T + bias for weights of 4- or 8-bit codes (quantized_format.h has the layout).
//
// Each tile of 16 rows of the weight is read once for all the rows of x. With few rows the cost is
// reading the weight; the products of codes take a third of that time. Many rows of 16 bits meet a
// dense copy of the weight in the library's product, which has instructions for them.
#include "quantized.h"

namespace aigc_fast {
namespace {

// In double, one weight at a time: the oracle's precision, not its speed.
void tile_times_doubles(const QuantizedFormat& f, const uint8_t* block, const double* x,
                        double* out) {
  const auto code = [&](int64_t r, int64_t k) -> int {
    if (f.bits == 8) return block[k / 4 * 64 + r * 4 + k % 4];
    return block[k / 8 * 64 + r * 4 + k % 4] >> k % 8 / 4 * 4 & 15;
  };
  const auto half = [&](int64_t i) {
    fp16 v;
    std::memcpy(static_cast<void*>(&v), block + f.code_bytes() + 2 * i, sizeof v);
    return static_cast<double>(v.value);
  };
  std::fill_n(out, kTileRows, 0.0);
  for (int64_t g = 0; g < f.groups; ++g, block += f.block_bytes(), x += f.group_size)
    for (int64_t r = 0; r < kTileRows; ++r) {
      double products = 0, total = 0;
      for (int64_t k = 0; k < f.group_size; ++k) {
        products += (code(r, k) - f.zero()) * x[k];
        total += x[k];
      }
      out[r] += half(r) * products + (f.has_minimum ? half(kTileRows + r) * total : 0);
    }
}

// What int8 codes of each group give back.
void round_to_codes(std::vector<double>& x, int64_t group_size) {
  for (auto group = x.begin(); group < x.end(); group += group_size) {
    double top = 0;
    for (int64_t k = 0; k < group_size; ++k) top = std::max(top, std::abs(group[k]));
    for (int64_t k = 0; k < group_size && top > 0; ++k)
      group[k] = std::nearbyint(group[k] * (127 / top)) * (top / 127);
  }
}

constexpr int64_t kDenseRows = 64;
constexpr int64_t kDenseSize = int64_t{1} << 21;  // elements: new memory costs more than decoding

// y = x @ weight.T + bias, all contiguous, for many rows of x.
template <class T>
void dense_linear(const Tensor& x, const QuantizedFormat& f, const uint8_t* blocks, const T* bias,
                  int64_t out_features, T* y) {
  const int64_t in_features = x.size(-1), rows = x.numel() / in_features;
  const int64_t tiles = (out_features + kTileRows - 1) / kTileRows;
  const int64_t some = std::max<int64_t>(1, kDenseSize / (in_features * kTileRows));
  const int64_t grain = grain_of(in_features * kTileRows);
  for (int64_t tile = 0; tile < tiles; tile += some) {
    const int64_t first = tile * kTileRows, count = std::min(some, tiles - tile);
    const int64_t width = std::min(count * kTileRows, out_features - first);
    Tensor dense = empty({in_features, width}, x.scalar_type());
    T* columns = mutable_data<T>(dense);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      decode_tiles(f, blocks + tile * f.tile_bytes(), begin, end, in_features, width, columns);
    });
    Tensor product = torch::stable::matmul(x, dense);
    if (product.scalar_type() != x.scalar_type())  // as autocast likes it
      product = torch::stable::to(product, x.scalar_type());
    const T* from = data<T>(product);
    torch::stable::parallel_for(0, rows, kGrain / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for_vectors<float>(width, [&](int64_t i, auto n) {
          Vec<float> v = load(from + row * width + i, n);
          if (bias) v += load(bias + first + i, n);
          store(y + row * out_features + first + i, v, n);
        });
    });
  }
}

Tensor quantized_linear(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias_in,
                        int64_t bits, int64_t group_size, int64_t out_features,
                        bool quantize_activations) {
  const QuantizedFormat f = format_of(weight_in, bits, group_size, out_features);
  check_operands(f, x_in, bias_in, out_features);
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  MaybeTensor bias;
  if (bias_in) bias = as_contiguous(*bias_in);
  const int64_t in_features = x.size(-1), rows = x.numel() / in_features;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = empty(sizes, x.scalar_type());
  if (rows == 0) return y;

  const int64_t tiles = weight.size(0);
  const int64_t grain = grain_of(f.columns() * kTileRows * rows / 4);
  const auto* blocks = data<uint8_t>(weight);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T *in = data<T>(x), *b = bias ? data<T>(*bias) : nullptr;
    T* out = mutable_data<T>(y);
    if constexpr (sizeof(T) == 2)
      if (rows >= kDenseRows && !quantize_activations)
        return dense_linear<T>(x, f, blocks, b, out_features, out);
    auto finish = [&](int64_t row, int64_t tile, const A* results) {
      const int64_t column = tile * kTileRows;
      for_vectors<A>(std::min(kTileRows, out_features - column), [&](int64_t i, auto n) {
        Vec<A> v = load(results + i);
        if (b) v += load(b + column + i, n);
        store(out + row * out_features + column + i, v, n);
      });
    };
    if constexpr (std::is_same_v<T, double>) {
      std::vector<double> wide(f.columns());
      double results[kTileRows];
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(in + row * in_features, in_features, wide.begin());
        if (quantize_activations) round_to_codes(wide, group_size);
        for (int64_t t = 0; t < tiles; ++t) {
          tile_times_doubles(f, blocks + t * f.tile_bytes(), wide.data(), results);
          finish(row, t, results);
        }
      }
    } else {
      Activations activations(quantize_activations);
      activations.reset(f, rows);
      in_parallel(rows, f.columns(),
                  [&](int64_t r) { activations.set(r, in + r * in_features, in_features); });
      torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
        multiply_tiles(f, blocks, activations, {0, rows}, begin, end, finish);
      });
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace
}  // namespace aigc_fast

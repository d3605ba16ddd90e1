// y = x @ weight.T + bias for weights of 4- or 8-bit codes (quantized.h has the layout).
//
// Each tile of 16 rows of the weight is read once for all the rows of x. With few rows the cost is
// reading the weight; the products of codes take a third of that time.
#include "quantized.h"

namespace aigc_fast {
namespace {

QuantizedFormat format_of(const Tensor& x, const Tensor& weight, int64_t bits, int64_t group_size,
                          int64_t out_features) {
  require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  require(x.dim() > 0 && weight.dim() == 3, "weight must have 3 dimensions, x at least 1");
  require(weight.scalar_type() == ScalarType::Byte, "weight must be uint8");
  const int64_t run = 32 / bits;
  require(group_size > 0 && group_size % run == 0 && group_size <= 65536,
          "group_size must be a multiple of ", run, " up to 65536, got ", group_size);
  QuantizedFormat f{bits, weight.size(1), group_size, true};
  f.has_minimum = weight.size(2) == f.block_bytes();
  require(weight.size(2) == f.block_bytes(), "weight must have ", f.block_bytes(), " or ",
          f.block_bytes() - 2 * kTileRows, " bytes a block, got ", weight.size(2));
  require(weight.size(0) == (out_features + kTileRows - 1) / kTileRows && out_features > 0,
          "weight must have out_features / 16 tiles");
  const int64_t in_features = x.size(-1);
  require(in_features > f.columns() - group_size && in_features <= f.columns(),
          "x must have in_features of weight, at most ", f.columns(), ", got ", in_features);
  return f;
}

// In double, one weight at a time: the oracle's precision, not its speed.
template <class F>
void tile_times_doubles(const QuantizedFormat& f, const uint8_t* block, const double* x,
                        double* out, F&& code) {
  std::fill_n(out, kTileRows, 0.0);
  for (int64_t g = 0; g < f.groups; ++g, block += f.block_bytes(), x += f.group_size)
    for (int64_t r = 0; r < kTileRows; ++r) {
      const auto half = [&](int64_t i) {
        fp16 v;
        std::memcpy(static_cast<void*>(&v), block + f.code_bytes() + 2 * i, 2);
        return static_cast<double>(v.value);
      };
      double products = 0, total = 0;
      for (int64_t k = 0; k < f.group_size; ++k) {
        products += (code(block, r, k) - f.zero()) * x[k];
        total += x[k];
      }
      out[r] += half(r) * products + (f.has_minimum ? half(kTileRows + r) * total : 0);
    }
}

Tensor quantized_linear(const Tensor& x_in, const Tensor& weight_in,
                        const std::optional<Tensor>& bias_in, int64_t bits, int64_t group_size,
                        int64_t out_features, bool quantize_activations) {
  QuantizedFormat f = format_of(x_in, weight_in, bits, group_size, out_features);
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) {
    require(bias_in->dim() == 1 && bias_in->size(0) == out_features &&
                bias_in->scalar_type() == x.scalar_type(),
            "bias must have shape (", out_features, ",) and the dtype of x");
    bias = as_contiguous(*bias_in);
  }
  const int64_t in_features = x.size(-1), rows = x.numel() / in_features;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = empty(sizes, x.scalar_type());
  if (rows == 0) return y;

  const int64_t tiles = weight.size(0);
  const int64_t grain = std::max<int64_t>(1, 4 * kGrain / (f.columns() * kTileRows * rows));
  const auto* blocks = data<uint8_t>(weight);
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T *in = data<T>(x), *b = bias ? data<T>(*bias) : nullptr;
    T* out = mutable_data<T>(y);
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
        if (quantize_activations)
          for (int64_t g = 0; g < f.groups; ++g) {
            double* v = wide.data() + g * group_size;
            double top = 0;
            for (int64_t k = 0; k < group_size; ++k) top = std::max(top, std::abs(v[k]));
            for (int64_t k = 0; k < group_size && top > 0; ++k)
              v[k] = std::nearbyint(v[k] * (127 / top)) * (top / 127);
          }
        for (int64_t t = 0; t < tiles; ++t) {
          tile_times_doubles(f, blocks + t * f.tile_bytes(), wide.data(), results,
                             [&](const uint8_t* block, int64_t r, int64_t k) -> int {
                               if (bits == 8) return block[k / 4 * 64 + r * 4 + k % 4];
                               return block[k / 8 * 64 + r * 4 + k % 4] >> k % 8 / 4 * 4 & 15;
                             });
          finish(row, t, results);
        }
      }
    } else if (quantize_activations) {
      QuantizedRows codes(f, rows);
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / f.columns()),
                                  [&](int64_t begin, int64_t end) {
                                    for (int64_t r = begin; r < end; ++r)
                                      codes.quantize(r, in + r * in_features, in_features);
                                  });
      with_format(f, [&](auto width, auto minimum, auto group) {
        torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t)
            for_row_runs(rows, [&]<int M>(int64_t first, std::integral_constant<int, M>) {
              float results[M * kTileRows];
              tile_times_codes<width, minimum, group, M>(f, blocks + t * f.tile_bytes(), codes,
                                                         first, results);
              for (int m = 0; m < M; ++m) finish(first + m, t, results + m * kTileRows);
            });
        });
      });
    } else {
      std::vector<float> wide(rows * f.columns()), totals(rows * f.groups);
      for (int64_t r = 0; r < rows; ++r)
        for_vectors<float>(in_features, [&](int64_t i, auto n) {
          store(wide.data() + r * f.columns() + i, load(in + r * in_features + i, n), n);
        });
      for (int64_t g = 0; g < rows * f.groups; ++g)
        for (int64_t k = 0; k < group_size; ++k) totals[g] += wide[g * group_size + k];
      with_format(f, [&](auto width, auto minimum, auto group) {
        torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t)
            for_row_runs<4>(rows, [&]<int M>(int64_t first, std::integral_constant<int, M>) {
              float results[M * kTileRows];
              tile_times_floats<width, minimum, group, M>(
                  f, blocks + t * f.tile_bytes(), wide.data() + first * f.columns(),
                  totals.data() + first * f.groups, results);
              for (int m = 0; m < M; ++m) finish(first + m, t, results + m * kTileRows);
            });
        });
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

// y = residual + gain * prelu(conv(x, weight) + bias): 3x3, a border of zeros, channels_last.
#include "conv3x3.h"

#include "channels.h"
#include "memory_order.h"

namespace aigc_fast {
namespace {

// `values`, or `missing` for every channel, padded to whole vectors of any width.
template <class T>
std::vector<Acc<T>> padded(const MaybeTensor& values, const char* name, int64_t out,
                           Acc<T> missing) {
  std::vector<Acc<T>> result(out + 2 * kLanes<Acc<T>>, missing);
  channel_values(values, out, name, missing, result.data());
  return result;
}

template <class Products, class T>
void convolve(const std::vector<ConvInput<T>>& sources, const ConvShape& s, const T* weight,
              const ConvFinish<T>& finish, const T* residual, T* y) {
  const Products products(weight, s);
  const int64_t rows = s.batch * s.height;
  // A thread's first row costs three rows of input.
  const int64_t grain = std::max<int64_t>(4, (1 << 18) / (s.width * s.in * s.out * 9) + 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    ImageRows<typename Products::S, T> image(sources, s, Products::depth(s), Products::pixels(s));
    [[maybe_unused]] const typename Products::Session session;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * s.width * s.out;
      products.row(image.around(r / s.height, r % s.height), y + at,
                   residual ? residual + at : nullptr, finish);
    }
  });
}

Tensor conv3x3(const std::vector<Tensor>& xs, const Tensor& weight_in, const MaybeTensor& bias,
               const MaybeTensor& slope, const MaybeTensor& residual_in, double gain) {
  const ScalarType dtype = weight_in.scalar_type();
  require(weight_in.dim() == 4 && weight_in.size(2) == 3 && weight_in.size(3) == 3,
          "weight must have shape (out, in, 3, 3)");
  require(!xs.empty(), "x must be at least one tensor");
  ConvShape s{};
  for (const Tensor& x : xs) {
    require(x.dim() == 4, "x must have 4 dimensions");
    require(x.scalar_type() == dtype, "x must have the dtype of weight");
    const ConvShape own{x.size(0), x.size(2), x.size(3), s.in + x.size(1), weight_in.size(0)};
    require(
        &x == &xs[0] || (own.batch == s.batch && own.height == s.height && own.width == s.width),
        "x must be tensors of one batch, height and width");
    s = own;
  }
  require(s.in == weight_in.size(1) && s.in > 0, "weight must have the channels of x, ", s.in);
  require(s.height > 0 && s.width > 0, "x must have height and width");
  for (const auto& p : {bias, slope, residual_in})
    require(!p || p->scalar_type() == dtype, "bias, slope and residual must have the dtype of x");

  Tensor y = empty_in_order({s.batch, s.out, s.height, s.width}, dtype, true);
  MaybeTensor residual;
  if (residual_in) {
    require(same_shape(*residual_in, y), "residual must have the shape of the result");
    residual = in_order_of(*residual_in, y);
  }
  if (y.numel() == 0) return y;
  const Tensor weight = as_contiguous(weight_in);
  dispatch(weight, "weight", [&]<class T>(T) {
    std::vector<ConvInput<T>> sources;
    for (const Tensor& x : xs)
      sources.push_back({data<T>(x), x.size(1), x.stride(0), x.size(1) == 1 ? 1 : x.stride(1),
                         x.stride(2), x.stride(3)});
    using A = Acc<T>;
    const std::vector<A> biases = padded<T>(bias, "bias", s.out, 0);
    const std::vector<A> slopes = padded<T>(slope, "slope", s.out, 1);
    const ConvFinish<T> finish{biases.data(), slopes.data(), A(gain), s.out};
    const T* beside = residual ? data<T>(*residual) : nullptr;
    const auto run = [&]<class P>(std::type_identity<P>) {
      convolve<P>(sources, s, data<T>(weight), finish, beside, mutable_data<T>(y));
    };
    if constexpr (std::is_same_v<T, bf16>) {
#if AIGC_AMX
      if (has_amx_bf16()) return run(std::type_identity<TileProducts>{});
#endif
#if AIGC_BF16_DOT
      if (has_bf16_dot()) return run(std::type_identity<VectorProducts<T, Bf16Dot>>{});
#endif
    }
    run(std::type_identity<VectorProducts<T, MultiplyAdd<T>>>{});
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }

}  // namespace
}  // namespace aigc_fast

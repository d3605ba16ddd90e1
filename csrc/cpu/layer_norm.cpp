// The adaLN chain (layer_norm.h), its parts each alone or together.
#include "layer_norm.h"

namespace aigc_fast {
namespace {

// (modulated norm of h, h) with h = x, or h = residual + gate * x.
std::tuple<Tensor, Tensor> forward(const MaybeTensor& residual_in, const Tensor& x_in,
                                   const MaybeTensor& gate_in, const MaybeTensor& scale_in,
                                   const MaybeTensor& shift_in, const MaybeTensor& weight,
                                   const MaybeTensor& bias, double eps, bool rms) {
  const Modulation modulation(x_in, {&gate_in, &scale_in, &shift_in});
  check_affine(weight, x_in);
  check_affine(bias, x_in);
  if (residual_in) check_like(*residual_in, x_in, "residual");
  const Rows x = as_rows(x_in), residual = residual_in ? as_rows(*residual_in) : x;
  const int64_t width = x.width, count = modulation.count;
  const Rows gate = modulation_rows(gate_in, modulation.dtype, count, width, 0);
  const Rows scale = modulation_rows(scale_in, modulation.dtype, count, width, 0);
  const Rows shift = modulation_rows(shift_in, modulation.dtype, count, width, 0);
  const Rows w = modulation_rows(weight, x_in.scalar_type(), 1, width, 1);
  const Rows b = modulation_rows(bias, x_in.scalar_type(), 1, width, 0);
  const bool gated = gate_in.has_value();
  Tensor y = empty_like_rows(x_in), h = gated ? empty_like_rows(x_in) : y;
  const int64_t run = x.count / std::max<int64_t>(1, count);
  modulation.dispatch_with(x_in, [&]<class T, class M>(T, M) {
    using A = Acc<T>;
    with_flags(rms, gated, [&]<bool is_rms, bool is_gated>() {
      torch::stable::parallel_for(0, x.count, grain_of(width), [&](int64_t begin, int64_t end) {
        KeptBuffer<A> prepared(3 * width);
        A *slope = prepared.data(), *offset = slope + width, *gates = offset + width;
        for (int64_t r = begin; r < end; ++r) {
          if (r == begin || r % run == 0) {
            const int64_t m = r / run;
            prepare<T, M, 3, 2, 3>(width, {w.at<T>(0), b.at<T>(0)},
                                   {scale.at<M>(m), shift.at<M>(m), gate.at<M>(m)},
                                   {slope, offset, gates}, [](auto& v) {
                                     const Vec<A> s = A(1) + v[2];
                                     return Vectors<A, 3>{{v[0] * s, v[1] * s + v[3], v[4]}};
                                   });
          }
          const T* in = x.at<T>(r);
          if constexpr (is_gated) {
            T* to = mutable_data<T>(h) + r * width;
            map_row<T, 2, 1>(width, {residual.at<T>(r), in}, to,
                             [](auto& v) { return v[0] + v[1] * v[2]; }, {gates});
            in = to;
          }
          const auto of = row_moments<T, !is_rms, 0, 1>({in}, width, [](auto...) {});
          const A mean = of.near + of.rest, factor = 1 / std::sqrt(of.variance + A(eps));
          map_row<T, 1, 2>(width, {in}, mutable_data<T>(y) + r * width,
                           [=](auto& v) { return (v[0] - mean) * factor * v[1] + v[2]; },
                           {slope, offset});
        }
      });
    });
  });
  return {y, h};
}

Tensor modulated_norm(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& shift,
                      const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool rms) {
  return std::get<0>(forward({}, x, {}, scale, shift, weight, bias, eps, rms));
}
std::tuple<Tensor, Tensor> gated_residual_norm(const Tensor& residual, const Tensor& x,
                                               const Tensor& gate, const Tensor& scale,
                                               const Tensor& shift, const MaybeTensor& weight,
                                               const MaybeTensor& bias, double eps, bool rms) {
  return forward(residual, x, gate, scale, shift, weight, bias, eps, rms);
}

Tensor gated_residual(const Tensor& residual_in, const Tensor& x_in, const Tensor& gate_in) {
  const MaybeTensor maybe = gate_in;
  const Modulation modulation(x_in, {&maybe});
  check_like(residual_in, x_in, "residual");
  const Rows x = as_rows(x_in), residual = as_rows(residual_in), gate = as_rows(gate_in);
  Tensor y = empty_like_rows(x_in);
  const int64_t width = x.width, run = x.count / std::max<int64_t>(1, modulation.count);
  modulation.dispatch_with(x_in, [&]<class T, class M>(T, M) {
    using A = Acc<T>;
    torch::stable::parallel_for(0, x.count, grain_of(width), [&](int64_t begin, int64_t end) {
      KeptBuffer<A> gates(width);
      for (int64_t r = begin; r < end; ++r) {
        if (r == begin || r % run == 0)
          prepare<T, M, 1, 0, 1>(width, {}, {gate.at<M>(r / run)}, {gates.data()},
                                 [](auto& v) { return Vectors<A, 1>{{v[0]}}; });
        map_row<T, 2, 1>(width, {residual.at<T>(r), x.at<T>(r)}, mutable_data<T>(y) + r * width,
                         [](auto& v) { return v[0] + v[1] * v[2]; }, {gates.data()});
      }
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("modulated_norm", TORCH_BOX(&modulated_norm));
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_norm", TORCH_BOX(&gated_residual_norm));
}

}  // namespace
}  // namespace aigc_fast

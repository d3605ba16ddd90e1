// act(gate) * up and its derivative, act being silu or one of the two gelus. Gate and up may be the
// halves of one packed tensor: both are read in place.
#include "rows.h"
#include "two_vectors.h"

#include <aigc_fast/smooth_activation.h>

namespace aigc_fast {
namespace {

// Elements per unit of work: rows wider than this are cut.
constexpr int64_t kPiece = 8192;

// Calls f(row, column, count) for pieces of rows, in parallel; where all the rows follow one
// another without a gap they count as one.
template <class F>
void for_pieces(int64_t count, int64_t width, bool without_gaps, F&& f) {
  if (without_gaps) width *= std::exchange(count, 1);
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  in_parallel(count * pieces, std::min(width, kPiece), [&](int64_t u) {
    const int64_t column = u % pieces * kPiece;
    f(u / pieces, column, std::min(kPiece, width - column));
  });
}

void check(const Tensor& gate, const Tensor& other, const char* name) {
  require(gate.dim() > 0, "gate must have at least 1 dimension");
  require(same_shape(gate, other), name, " must have the shape of gate");
  require(gate.scalar_type() == other.scalar_type(), name, " must have the dtype of gate");
}

template <Smooth act>
Tensor forward(const Tensor& gate_in, const Tensor& up_in) {
  check(gate_in, up_in, "up");
  const Rows gate = as_rows(gate_in), up = as_rows(up_in);
  Tensor y = empty_like_rows(gate_in);
  const int64_t width = gate.width;
  dispatch(gate_in, "gate", [&]<class T>(T) {
    using A = Acc<T>;
    T* out = mutable_data<T>(y);
    for_pieces(gate.count, width, gate.stride == width && up.stride == width,
               [&](int64_t row, int64_t column, int64_t count) {
                 const T *g = gate.at<T>(row) + column, *u = up.at<T>(row) + column;
                 map_row<T, 2, 0, Ties::away>(
                     count, {g, u}, out + row * width + column,
                     [](const auto& v) { return smooth<act, A, T>(v[0]) * v[1]; });
               });
  });
  return y;
}

// (dgate, dup) = (dy * up * act'(gate), dy * act(gate))
template <Smooth act>
std::tuple<Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& gate_in,
                                    const Tensor& up_in) {
  check(gate_in, up_in, "up");
  check(gate_in, dy_in, "grad_output");
  const Rows gate = as_rows(gate_in), up = as_rows(up_in), dy = as_rows(dy_in);
  Tensor dgate = empty_like_rows(gate_in), dup = empty_like_rows(gate_in);
  const int64_t width = gate.width;
  dispatch(gate_in, "gate", [&]<class T>(T) {
    using A = Acc<T>;
    T *gate_out = mutable_data<T>(dgate), *up_out = mutable_data<T>(dup);
    const bool without_gaps = gate.stride == width && up.stride == width && dy.stride == width;
    for_pieces(gate.count, width, without_gaps, [&](int64_t row, int64_t column, int64_t count) {
      const T *g = gate.at<T>(row) + column, *u = up.at<T>(row) + column;
      const T* d = dy.at<T>(row) + column;
      const int64_t to = row * width + column;
      map_at<T, 2>(count, {gate_out + to, up_out + to}, [=](auto at) {
        const Activated<A> a = activate<act, A, T>(at(g));
        const Vec<A> grad = at(d);
        return Vectors<A, 2>{grad * at(u) * a.slope, grad * a.value};
      });
    });
  });
  return {dgate, dup};
}

Tensor swiglu(const Tensor& gate, const Tensor& up) { return forward<Smooth::silu>(gate, up); }
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  return backward<Smooth::silu>(dy, gate, up);
}
Tensor geglu(const Tensor& gate, const Tensor& up, bool tanh) {
  return tanh ? forward<Smooth::gelu_tanh>(gate, up) : forward<Smooth::gelu>(gate, up);
}
std::tuple<Tensor, Tensor> geglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                          bool tanh) {
  return tanh ? backward<Smooth::gelu_tanh>(dy, gate, up) : backward<Smooth::gelu>(dy, gate, up);
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace
}  // namespace aigc_fast

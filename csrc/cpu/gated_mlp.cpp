// silu(gate) * up and its derivative. Gate and up may be the halves of one packed tensor: both are
// read in place.
#include "rows.h"

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
  const int64_t grain =
      std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(width, kPiece)));
  torch::stable::parallel_for(0, count * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t column = u % pieces * kPiece;
      f(u / pieces, column, std::min(kPiece, width - column));
    }
  });
}

void check(const Tensor& gate, const Tensor& other, const char* name) {
  require(gate.dim() > 0, "gate must have at least 1 dimension");
  require(same_shape(gate, other), name, " must have the shape of gate");
  require(gate.scalar_type() == other.scalar_type(), name, " must have the dtype of gate");
}

Tensor swiglu(const Tensor& gate_in, const Tensor& up_in) {
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
                 T* o = out + row * width + column;
                 for_vectors<A>(count, [&](int64_t i, auto lanes) {
                   const Vec<A> v = load(g + i, lanes);
                   store(o + i, v * sigmoid<A>(v) * load(u + i, lanes), lanes);
                 });
               });
  });
  return y;
}

// (dgate, dup) = (dy * up * s * (1 + gate * (1 - s)), dy * gate * s), s = sigmoid(gate)
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_in, const Tensor& gate_in,
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
      for_vectors<A>(count, [&](int64_t i, auto lanes) {
        const Vec<A> v = load(g + i, lanes), s = sigmoid<A>(v), grad = load(d + i, lanes);
        store(up_out + to + i, grad * (v * s), lanes);
        const Vec<A> slope = s * (A(1) + v * (A(1) - s));
        store(gate_out + to + i, grad * load(u + i, lanes) * slope, lanes);
      });
    });
  });
  return {dgate, dup};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace
}  // namespace aigc_fast

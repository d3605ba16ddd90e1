// Elementwise instructions one after the other, each rounded to the dtype of its result as torch's
// operators round, in one pass over memory: blocks of what only later instructions read stay in
// the L1 cache. None multiplies and adds, so that there is nothing a compiler could fuse.
#include "pointwise_program.h"

#include "kept_buffer.h"

namespace aigc_fast {
namespace {

constexpr int64_t kPiece = 4096;  // elements a thread takes at a time
constexpr int64_t kBlock = 512;   // elements an instruction takes at a time

// out[i] = f(x[i]...), rounded to R
template <class R, class F, class... X>
AIGC_INLINE void map(int64_t n, R* out, F f, const X*... x) {
  for_vectors<Acc<R>>(
      n, [=](int64_t i, auto lanes) { store(out + i, f(load(x + i, lanes)...), lanes); });
}

template <class R, class P, class Q>
void of_two(int code, int64_t n, R* out, const P* a, const Q* b) {
  using V = Vec<Acc<R>>;
  if (code == kAdd) return map(n, out, [](V x, V y) { return x + y; }, a, b);
  if (code == kSub) return map(n, out, [](V x, V y) { return x - y; }, a, b);
  if (code == kMul) return map(n, out, [](V x, V y) { return x * y; }, a, b);
  map(n, out, [](V x, V y) { return x / y; }, a, b);
}

template <class R>
Acc<R> rounded(double x) {
  R element;
  store_one(&element, static_cast<Acc<R>>(x));
  return load_one(&element);
}

// torch rounds the scalar of a product or quotient as its arithmetic, and others as the result.
template <class R>
void of_scalar(const Instruction& k, int64_t n, R* out, const R* a) {
  using A = Acc<R>;
  using V = Vec<A>;
  const int code = k.code - kScalar;
  const A s = code == kMul || code == kDiv ? A(k.first) : rounded<R>(k.first);
  const V v = broadcast(s), high = broadcast(rounded<R>(k.last));
  if (code == kAdd) return map(n, out, [=](V x) { return x + v; }, a);
  if (code == kSub) return map(n, out, [=](V x) { return x - v; }, a);
  if (code == kMul) return map(n, out, [=](V x) { return x * v; }, a);
  if (code == kDiv) return map(n, out, [=](V x) { return x / v; }, a);
  const auto clamp = [=](V x) {
    x = x < v ? v : x;  // keeps NaN
    return x > high ? high : x;
  };
  map(n, out, clamp, a);
}

// Where T is an element's type, other elements are of the type of its arithmetic.
template <class T, class F>
AIGC_INLINE void typed(ScalarType dtype, F f) {
  if constexpr (sizeof(T) == 2)
    if (size_of(dtype) == 2) return f(T{});
  f(Acc<T>{});
}

template <class T>
void run(const Instruction& k, const std::vector<Value>& values, int64_t n, char* out,
         const char* a, const char* b) {
  typed<T>(values[k.a].dtype, [&]<class P>(P) {
    const P* x = reinterpret_cast<const P*>(a);
    if (k.code == kTo) {
      typed<T>(k.dtype, [&]<class R>(R) {
        map(n, reinterpret_cast<R*>(out), [](Vec<Acc<R>> v) { return v; }, x);
      });
    } else if (!k.of_two()) {
      of_scalar(k, n, reinterpret_cast<P*>(out), x);
    } else {
      typed<T>(values[k.b].dtype, [&]<class Q>(Q) {
        using R = std::conditional_t<std::is_same_v<P, Q>, P, Acc<T>>;
        of_two(k.code, n, reinterpret_cast<R*>(out), x, reinterpret_cast<const Q*>(b));
      });
    }
  });
}

std::vector<Tensor> pointwise_program(std::vector<Tensor> inputs, const std::vector<int64_t>& code,
                                      const std::vector<double>& scalars) {
  require(!inputs.empty(), "inputs must not be empty");
  for (const Tensor& x : inputs) {
    require(same_shape(x, inputs[0]), "inputs must have one shape");
    dispatch(x, "inputs", [](auto) {});
  }
  const Program program(inputs, code, scalars);
  const Tensor first = is_dense(inputs[0]) ? inputs[0] : torch::stable::empty_like(inputs[0]);
  std::vector<Tensor> results;
  for (const Value& v : program.values) {
    const size_t i = &v - program.values.data();
    if (i < inputs.size()) inputs[i] = in_order_of(inputs[i], first);
    if (v.result < 0) continue;
    results.resize(program.results);
    results[v.result] = empty_strided(first.sizes(), first.strides(), v.dtype);
  }
  // Element e of value i is at[i] + e * step[i]; slots hold a block, and step is 0.
  std::vector<char*> at;
  std::vector<int64_t> step;
  for (const Value& v : program.values) {
    const size_t i = at.size();
    const bool is_input = i < inputs.size();
    step.push_back(is_input || v.result >= 0 ? size_of(v.dtype) : 0);
    at.push_back(is_input        ? const_cast<char*>(data<char>(inputs[i]))
                 : v.result >= 0 ? mutable_data<char>(results[v.result])
                                 : nullptr);
  }
  const ScalarType kind = std::min_element(program.values.begin(), program.values.end(),
                                           [](const Value& a, const Value& b) {
                                             return size_of(a.dtype) < size_of(b.dtype);
                                           })
                              ->dtype;
  const int64_t size = first.numel(), first_result = inputs.size();
  const auto work = [&]<class T>(T) {
    in_parallel((size + kPiece - 1) / kPiece, kPiece, [&](int64_t piece) {
      KeptBuffer<Acc<T>> slots(program.slots * kBlock);
      const auto block_of = [&](int64_t i, int64_t begin) {
        const Value& v = program.values[i];
        return v.slot < 0 ? at[i] + begin * step[i]
                          : reinterpret_cast<char*>(slots.data() + v.slot * kBlock);
      };
      const int64_t end = std::min(size, (piece + 1) * kPiece);
      for (int64_t begin = piece * kPiece; begin < end; begin += kBlock) {
        int64_t result = first_result;
        for (const Instruction& k : program.instructions)
          run<T>(k, program.values, std::min(kBlock, end - begin), block_of(result++, begin),
                 block_of(k.a, begin), k.of_two() ? block_of(k.b, begin) : nullptr);
      }
    });
  };
  if (kind == ScalarType::Double)
    work(double{});
  else if (kind == ScalarType::Float)
    work(float{});
  else if (kind == ScalarType::Half)
    work(fp16{});
  else
    work(bf16{});
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("pointwise_program", TORCH_BOX(&pointwise_program));
}

}  // namespace
}  // namespace aigc_fast

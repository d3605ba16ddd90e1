// The matrices of a call of spectral_norm, and how threads share them.
//
// A thread takes one matrix after another, so that the products and the division read it from the
// cache; only those that outgrow it are cut into pieces for all threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "sums.h"
#include "tensor.h"

namespace aigc_fast {

// Elements of a matrix that all threads share, of a piece of it, and the columns of a piece in
// W' u, where every piece walks down all rows.
constexpr int64_t kShared = 1 << 20, kPiece = 16384, kColumns = 1024;

// The matrices of a call.
struct WeightShapes {
  std::vector<int64_t> rows, columns;
  int64_t size = 0;  // elements of all
  // Where the vectors of each matrix lie in one tensor of all: every u, then every v.
  std::vector<int64_t> u_at, v_at;
  int64_t vectors = 0;

  explicit WeightShapes(const std::vector<Tensor>& weights) {
    require(!weights.empty(), "weights must not be empty");
    for (const Tensor& w : weights) {
      require(w.scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
      require(w.dim() >= 2 && w.numel() > 0, "weights must have 2 dimensions, and elements");
      rows.push_back(w.size(0));
      columns.push_back(w.numel() / w.size(0));
      size += w.numel();
    }
    for (int64_t n : rows) u_at.push_back(vectors), vectors += n;
    for (int64_t n : columns) v_at.push_back(vectors), vectors += n;
  }
  int64_t layers() const { return rows.size(); }
  int64_t elements(int64_t layer) const { return rows[layer] * columns[layer]; }
  bool shared(int64_t layer) const { return elements(layer) > kShared; }
  std::vector<int64_t> all_elements() const {
    std::vector<int64_t> result;
    for (int64_t l = 0; l < layers(); ++l) result.push_back(elements(l));
    return result;
  }

  // f(layer) for every layer: those that outgrow the cache one after the other, in which f may
  // use all threads, then the others, the largest first.
  template <class F>
  void for_layers(F f) const {
    std::vector<int64_t> order;
    for (int64_t l = 0; l < layers(); ++l) shared(l) ? f(l) : order.push_back(l);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return elements(a) > elements(b); });
    const int64_t count = order.size(), grain = std::max<int64_t>(1, count * kGrain / size);
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, count, grain, [&](int64_t, int64_t) {
      for (int64_t i; (i = next++) < count;) f(order[i]);
    });
  }
};

// f(first, last) for pieces of [0, size), in parallel unless within a parallel region. `back`: a
// thread begins with its last piece, for a pass after one that went forth: it then meets first what
// its cache still has.
template <class F>
void in_pieces(int64_t size, int64_t piece, bool back, F f) {
  const int64_t count = (size + piece - 1) / piece;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = back ? begin + end - 1 - i : i;
      f(p * piece, std::min(size, (p + 1) * piece));
    }
  });
}

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors, const WeightShapes& s,
                                      const std::vector<int64_t>& sizes, ScalarType dtype,
                                      const char* name) {
  require(static_cast<int64_t>(tensors.size()) == s.layers(), name, " must have ", s.layers(),
          " tensors");
  std::vector<Tensor> result;
  for (size_t l = 0; l < tensors.size(); ++l) {
    require(tensors[l].numel() == sizes[l] && tensors[l].scalar_type() == dtype, name,
            " must have the sizes and dtype of weights");
    result.push_back(as_contiguous(tensors[l]));
  }
  return result;
}

template <class T>
std::vector<Acc<T>> values(const T* from, int64_t size) {
  std::vector<Acc<T>> result(size);
  convert(from, size, result.data());
  return result;
}

}  // namespace aigc_fast

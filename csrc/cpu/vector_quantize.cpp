// The nearest code of every vector: quantized = codebook[k], k = argmin |x - codebook[k]|^2.
//
// The argmin of |e|^2 - 2 x.e is the argmax of x.e - |e|^2 / 2, which a chain of multiply-adds
// gives that starts at -|e|^2 / 2, feature by feature. Codes lie along the lanes: they are packed
// once a call into panels of two vectors, feature after feature, and a tile of kRows vectors x
// meets a panel in registers. No score is ever stored: every lane keeps the best of its codes. A
// panel stays in the first cache for all the rows of a block, and a block's rows in the second.
#include <vector>

#include "sums.h"
#include "vectors.h"

namespace aigc_fast {
namespace {

// 16 chains of multiply-adds with 32 registers, 8 with 16: two a cycle, each waiting four.
constexpr int kRows = kVectorBytes == 64 ? 8 : 4, kVectors = 2;
template <class A>
constexpr int64_t kCodes = kVectors * kLanes<A>;

// The codes in panels: feature after feature of kCodes codes, and where the chains of these start.
template <class A>
struct Panels {
  int64_t dim, count;
  std::vector<A> values, starts;

  template <class T>
  Panels(const T* codebook, int64_t codes, int64_t dim)
      : dim(dim),
        count((codes + kCodes<A> - 1) / kCodes<A>),
        values(count * dim * kCodes<A>),
        starts(count * kCodes<A>, -std::numeric_limits<A>::infinity()) {
    const int64_t grain = grain_of(dim * kCodes<A>);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t code = begin * kCodes<A>; code < std::min(codes, end * kCodes<A>); ++code) {
        const int64_t panel = code / kCodes<A>, lane = code % kCodes<A>;
        A *to = values.data() + panel * dim * kCodes<A> + lane, norm = 0;
        for_vectors<A>(dim, [&](int64_t d, auto n) {
          const Vec<A> v = load(codebook + code * dim + d, n);
          for (int k = 0; k < n; ++k) {
            to[(d + k) * kCodes<A>] = v[k];
            norm += v[k] * v[k];
          }
        });
        starts[code] = norm * A(-0.5);
      }
    });
  }
};

// Of each lane the best score and the number of the first code of the vector that has it.
template <class A>
struct Best {
  Vec<A> score = broadcast(-std::numeric_limits<A>::infinity());
  Vec<Bits<A>> code = {};

  // A score that is NaN or minus infinity is never the better one.
  AIGC_INLINE void offer(Vec<A> other, Bits<A> first) {
    const auto better = other > score;
    score = better ? other : score;
    code = better ? Vec<Bits<A>>{} + first : code;
  }
  // The best of all lanes, and of equal ones that of the lowest number.
  int64_t of_all() const {
    int best = 0;
    auto number = [&](int lane) { return int64_t{code[lane]} + lane; };
    for (int lane = 1; lane < kLanes<A>; ++lane)
      if (score[lane] > score[best] || (score[lane] == score[best] && number(lane) < number(best)))
        best = lane;
    return score[best] == -std::numeric_limits<A>::infinity() ? 0 : number(best);
  }
};

// kRows vectors x against one panel.
template <class A>
void meet(const A* x, const Panels<A>& panels, int64_t panel, Best<A>* best) {
  const int64_t dim = panels.dim;
  const A* codes = panels.values.data() + panel * dim * kCodes<A>;
  Vec<A> scores[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      scores[r][v] = load(panels.starts.data() + panel * kCodes<A> + v * kLanes<A>);
  for (int64_t d = 0; d < dim; ++d, codes += kCodes<A>) {
    const Vec<A> first = load(codes), second = load(codes + kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> value = broadcast(x[r * dim + d]);
      scores[r][0] += value * first;
      scores[r][1] += value * second;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      best[r].offer(scores[r][v], static_cast<Bits<A>>(panel * kCodes<A> + v * kLanes<A>));
}

// (quantized, |x - quantized|^2, numbers of codes)
std::tuple<Tensor, Tensor, Tensor> vector_quantize(const Tensor& x_in, const Tensor& codebook_in) {
  check_codebook(x_in, codebook_in);
  const Tensor x = as_contiguous(x_in), codebook = as_contiguous(codebook_in);
  const FeatureVectors rows(x);
  Tensor quantized = empty_like_dense(x);
  Tensor distances = empty({rows.outer, rows.inner}, acc_dtype(x));
  Tensor indices = empty({rows.outer, rows.inner}, ScalarType::Long);
  if (rows.count() == 0) return {quantized, distances, indices};
  dispatch(x, "x", [&]<class T>(T) {
    using A = Acc<T>;
    const T *from = data<T>(x), *codes = data<T>(codebook);
    const Panels<A> panels(codes, codebook.size(0), rows.dim);
    const int64_t blocks = (rows.count() + kVectorBlock - 1) / kVectorBlock, dim = rows.dim;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> block(kVectorBlock * dim), nearest(kVectorBlock * dim);
      std::vector<Best<A>> best(kVectorBlock);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kVectorBlock,
                      count = std::min(kVectorBlock, rows.count() - first);
        rows.gather(from, first, count, block.data());
        std::fill(best.begin(), best.end(), Best<A>{});
        for (int64_t panel = 0; panel < panels.count; ++panel)
          for (int64_t row = 0; row < count; row += kRows)  // the rows of the last tile are there
            meet(block.data() + row * dim, panels, panel, best.data() + row);
        for (int64_t row = 0; row < count; ++row) {
          const int64_t code = best[row].of_all();
          A *in = block.data() + row * dim, *out = nearest.data() + row * dim;
          const auto [sum] = sums_over<A, 1>(dim, [&](int64_t i, auto n, Vec<A>* sums) {
            const Vec<A> e = load(codes + code * dim + i, n), off = load(in + i, n) - e;
            store(out + i, e, n);
            sums[0] += off * off;
          });
          mutable_data<int64_t>(indices)[first + row] = code;
          mutable_data<A>(distances)[first + row] = sum;
        }
        rows.scatter(nearest.data(), first, count, mutable_data<T>(quantized));
      }
    });
  });
  return {quantized, distances, indices};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&vector_quantize));
}

}  // namespace
}  // namespace aigc_fast

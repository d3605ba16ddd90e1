// Tensors seen as rows, one for each sample of the batch, so that coefficients may differ from
// sample to sample. A tensor whose samples are laid out as those of the output is read in place
// whatever lies between them (a half of a packed model output, an expanded batch).
#pragma once

#include "tensor.h"

namespace aigc_fast {

// The few numbers of a floating tensor of any dtype: to look one up costs no call.
class Scalars {
 public:
  Scalars(const Tensor& x, const char* name) : values_(x.numel()) {
    const Tensor dense = as_contiguous(x);
    dispatch(dense, name, [&]<class T>(T) {
      for (size_t i = 0; i < values_.size(); ++i) values_[i] = load_one(data<T>(dense) + i);
    });
  }
  double operator[](int64_t i) const { return values_[i]; }

 private:
  std::vector<double> values_;
};

template <class T>
struct RowPointer {
  T* at = nullptr;
  int64_t stride = 0;
  T* row(int64_t i) const { return at + i * stride; }
};

// The rows of one call, whose results have the strides of torch.empty_like(sample): dense, in its
// memory order. `order()` is the first result and has the memory order in which all tensors are
// walked; where samples are interleaved and need different coefficients that is a contiguous one,
// which finish() copies to what the caller gets.
class SampleRows {
 public:
  SampleRows(const Tensor& sample, bool per_sample)
      : out_(is_dense(sample) ? empty_like_dense(sample) : torch::stable::empty_like(sample)),
        order_(out_),
        per_sample_(per_sample) {
    const int64_t size = sample.numel();
    const int64_t batch = sample.dim() ? sample.size(0) : 1;
    outermost_ = batch <= 1 || size == 0 || out_.stride(0) == size / batch;
    if (!outermost_ && per_sample) {
      order_ = empty_contiguous_like(sample);
      outermost_ = true;
    }
    rows = outermost_ ? std::max<int64_t>(batch, 1) : 1;
    inner = size / rows;
  }

  // Whether the rows of x lie as those of order().
  bool fits(const Tensor& x) const {
    bool same = outermost_ || same_strides(x, order_);
    for (int64_t d = 1; same && d < x.dim(); ++d)
      same = x.size(d) == 1 || x.stride(d) == order_.stride(d);
    return same;
  }
  // x, or a copy of it that fits.
  Tensor arrange(const Tensor& x) const { return fits(x) ? x : in_order_of(x, order_); }
  template <class T>
  RowPointer<const T> read(const Tensor& x) {
    return {data<T>(x), stride_of(x)};
  }
  template <class T>
  RowPointer<T> write(const Tensor& x) {
    return {mutable_data<T>(x), stride_of(x)};
  }
  // A further output.
  Tensor like() const { return empty_like_dense(order_); }
  const Tensor& order() const { return order_; }
  Tensor finish(const Tensor& x) const {
    if (same_strides(order_, out_)) return x;
    Tensor result = empty_like_dense(out_);
    torch::stable::copy_(result, x);
    return result;
  }

  // f(row, begin, length) for pieces of rows, in parallel. Call after read() and write().
  template <class F>
  void for_pieces(F&& f) {
    if (inner == 0) return;
    // With the same coefficients everywhere, rows without gaps are one long row.
    if (!per_sample_ && !gaps_) inner *= rows, rows = 1;
    const int64_t pieces = (inner + kPiece - 1) / kPiece;
    in_parallel(rows * pieces, std::min(inner, kPiece), [&](int64_t u) {
      const int64_t start = u % pieces * kPiece;
      f(u / pieces, start, std::min(kPiece, inner - start));
    });
  }

  // Elements in a piece: three fp32 tensors of it fit the L1 cache.
  static constexpr int64_t kPiece = 4096;
  int64_t rows, inner;

 private:
  int64_t stride_of(const Tensor& x) {
    const int64_t stride = rows > 1 ? x.stride(0) : inner;
    gaps_ |= stride != inner;
    return stride;
  }

  Tensor out_, order_;
  bool per_sample_, outermost_, gaps_ = false;
};

// Sums of the pieces of rows that differ from sample to sample, which threads add up in any order,
// and what they come to: float32, or float64 for tensors of it.
class SampleSums {
 public:
  explicit SampleSums(const SampleRows& rows)
      : pieces_((rows.inner + kPiece - 1) / kPiece),
        sums_(static_cast<size_t>(rows.rows * pieces_)) {}

  void set(int64_t row, int64_t begin, double sum) { sums_[row * pieces_ + begin / kPiece] = sum; }
  // factor times the sum of each sample of the batch x, (batch,)
  Tensor of_each(const Tensor& x, double factor) const {
    return added(x, {x.size(0)}, pieces_, factor);
  }
  // factor times the sum of all of x, a scalar
  Tensor of_all(const Tensor& x, double factor) const {
    return added(x, {}, static_cast<int64_t>(sums_.size()), factor);
  }

 private:
  Tensor added(const Tensor& x, const std::vector<int64_t>& shape, int64_t count,
               double factor) const {
    Tensor out = empty(shape, acc_dtype(x));
    const double* sums = sums_.data();
    for (int64_t i = 0; i < out.numel(); ++i, sums += count) {
      double total = 0;
      for (int64_t p = 0; p < count; ++p) total += sums[p];
      set_number(out, i, factor * total);
    }
    return out;
  }

  static constexpr int64_t kPiece = SampleRows::kPiece;
  int64_t pieces_;
  std::vector<double> sums_;
};

}  // namespace aigc_fast

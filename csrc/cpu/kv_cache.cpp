// Writes the keys and values of new tokens into preallocated caches: a copy, or what the options
// make of it on the way (rotated, divided by a scale, rounded to the type of the cache).
#include "cache.h"
#include "rotary.h"

namespace aigc_fast {
namespace {

// One (heads, head_dim) matrix of each token, copied between any strides.
struct Copy {
  const char* from;
  char* to;
  std::array<int64_t, 4> from_strides, to_strides;  // bytes
  int64_t heads, head_dim, item;

  Copy(const Tensor& source, Tensor& cache)
      : from(static_cast<const char*>(source.const_data_ptr())),
        to(static_cast<char*>(cache.mutable_data_ptr())),
        heads(source.size(2)),
        head_dim(source.size(3)),
        item(source.element_size()) {
    for (int d = 0; d < 4; ++d) {
      from_strides[d] = source.stride(d) * item;
      to_strides[d] = cache.stride(d) * item;
    }
    // Where whole tokens lie without gaps in both, a token is one long head.
    const int64_t head = head_dim * item;
    if (has_dense_rows() && from_strides[2] == head && to_strides[2] == head)
      head_dim *= std::exchange(heads, 1);
  }

  bool has_dense_rows() const {
    return head_dim == 1 || (from_strides[3] == item && to_strides[3] == item);
  }

  // Into slot `slot` of row `row` of the cache, a sequence or a page.
  void operator()(int64_t batch, int64_t token, int64_t row, int64_t slot) const {
    const char* source = from + batch * from_strides[0] + token * from_strides[1];
    char* target = to + row * to_strides[0] + slot * to_strides[1];
    for (int64_t h = 0; h < heads; ++h, source += from_strides[2], target += to_strides[2]) {
      if (has_dense_rows()) {
        std::memcpy(target, source, head_dim * item);
      } else {
        for (int64_t i = 0; i < head_dim; ++i)
          std::memcpy(target + i * to_strides[3], source + i * from_strides[3], item);
      }
    }
  }
};

// The same for tokens that are turned or whose type changes, head by head. C is the type of the
// cache; its scales are of heads.
template <class T, class C>
struct Convert {
  using A = Acc<T>;
  Tensor source;
  const T* from;
  C* to;
  std::array<int64_t, 4> from_strides, to_strides;
  int64_t heads, head_dim;
  std::vector<A> factors;

  Convert(const Tensor& tokens, Tensor& cache, const MaybeTensor& scale, const char* scale_name)
      : source(with_dense_rows(tokens)),
        from(data<T>(source)),
        to(mutable_data<C>(cache)),
        heads(source.size(2)),
        head_dim(source.size(3)),
        factors(of_heads<A>(scale, scale_name, heads)) {
    for (int d = 0; d < 4; ++d) from_strides[d] = source.stride(d), to_strides[d] = cache.stride(d);
    for (A& factor : factors) factor = 1 / factor;
    factors.resize(heads, A(1));
  }

  // turn(x, y) rotates the first `turned` features of a head. row, narrow: room for a head.
  template <class Turn>
  void operator()(int64_t batch, int64_t token, int64_t cache_row, int64_t slot, const Turn& turn,
                  int64_t turned, std::vector<A>& row, std::vector<C>& narrow) const {
    const T* x = from + batch * from_strides[0] + token * from_strides[1];
    C* y = to + cache_row * to_strides[0] + slot * to_strides[1];
    const bool dense = to_strides[3] == 1;
    for (int64_t h = 0; h < heads; ++h, x += from_strides[2], y += to_strides[2]) {
      turn(x, row.data());
      for_vectors<A>(head_dim - turned, [&](int64_t i, auto n) {
        store(row.data() + turned + i, load(x + turned + i, n), n);
      });
      C* out = dense ? y : narrow.data();
      for_vectors<A>(head_dim, [&](int64_t i, auto n) {
        store_cached(out + i, load(row.data() + i, n) * factors[h], n);
      });
      for (int64_t i = 0; !dense && i < head_dim; ++i) y[i * to_strides[3]] = out[i];
    }
  }
};

// Where the new tokens go.
struct Slots {
  Pages pages;
  int64_t capacity;

  Slots(const Tensor& key, const Tensor& cache, const Tensor& positions, const MaybeTensor& table)
      : q_len_(key.size(1)),
        wide_(positions.scalar_type() == ScalarType::Long),
        positions_(positions.const_data_ptr()) {
    const int64_t batch = key.size(0);
    if (table) pages = {*table, cache, batch};
    require(table || cache.size(0) == batch, "the caches must have the batch of key");
    capacity = cache.size(1) * (table ? table->size(1) : 1);
    require(q_len_ <= capacity, "key must not have more tokens than the caches have room for");
    require(positions.dim() == 1 && positions.size(0) == batch,
            "positions must have shape (batch,)");
    require(wide_ || positions.scalar_type() == ScalarType::Int,
            "positions must be int32 or int64");
    stride_ = positions.stride(0);
    // Nothing is written unless everything can be.
    for (int64_t b = 0; b < batch && q_len_ > 0; ++b) {
      const int64_t first = position(b);
      require(first >= 0 && first <= capacity - q_len_,
              "positions must lie in [0, capacity - q_len] = [0, ", capacity - q_len_, "], got ",
              first, " for sequence ", b);
      if (pages.table) pages.check(b, first, first + q_len_, cache.size(0));
    }
  }

  // f(batch, token, row of the cache, slot) for the tokens [begin, end) of all sequences.
  template <class F>
  void each(int64_t begin, int64_t end, F&& f) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / q_len_, token = i % q_len_, entry = position(b) + token;
      if (pages.table)
        f(b, token, pages.at(b, entry / pages.size), entry % pages.size);
      else
        f(b, token, b, entry);
    }
  }

 private:
  int64_t position(int64_t b) const {
    return wide_ ? static_cast<const int64_t*>(positions_)[b * stride_]
                 : static_cast<const int32_t*>(positions_)[b * stride_];
  }

  int64_t q_len_, stride_;
  bool wide_;
  const void* positions_;
};

void check(const Tensor& source, const Tensor& cache, const Tensor& like, const char* name) {
  require(source.dim() == 4 && cache.dim() == 4, name, " and its cache must have 4 dimensions");
  for (int d : {2, 3})
    require(source.size(d) == cache.size(d), name, " must have the heads of its cache");
  require(same_shape(cache, like) && cache.scalar_type() == like.scalar_type(),
          "caches must have the same shape and dtype");
  for (int d = 0; d < 4; ++d)
    require(cache.stride(d) != 0 || cache.size(d) <= 1, name, "_cache must not be expanded");
}

void append_kv_full(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
                    const Tensor& positions, const MaybeTensor& table, const MaybeTensor& cos,
                    const MaybeTensor& sin, bool interleaved, const MaybeTensor& key_scale,
                    const MaybeTensor& value_scale) {
  check(key, key_cache, key_cache, "key");
  check(value, value_cache, key_cache, "value");
  check_like(value, key, "value", "key");
  require(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (cos) check_angles(key, *cos, *sin);
  const Slots slots(key, key_cache, positions, table);
  const int64_t tokens = key.size(0) * key.size(1), token_size = key.size(2) * key.size(3);
  const int64_t grain = grain_of(token_size);
  dispatch(key, "key", [&]<class T>(T) {
    using A = Acc<T>;
    if (!cos && !key_scale && !value_scale && key_cache.scalar_type() == key.scalar_type()) {
      const Copy copy_key(key, key_cache), copy_value(value, value_cache);
      return torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
        slots.each(begin, end, [&](int64_t b, int64_t token, int64_t row, int64_t slot) {
          copy_key(b, token, row, slot);
          copy_value(b, token, row, slot);
        });
      });
    }
    const auto wide_angles = [&](const Tensor& x) {
      return with_dense_rows(torch::stable::to(x, acc_dtype(key)));
    };
    const Tensor wide_cos = cos ? wide_angles(*cos) : key, wide_sin = cos ? wide_angles(*sin) : key;
    std::optional<Rotation<A, A>> rotation;
    if (cos) rotation.emplace(wide_cos, wide_sin, interleaved, false);
    dispatch_cache_of<T>(key_cache, [&]<class C>(C) {
      const Convert<T, C> convert_key(key, key_cache, key_scale, "key_scale");
      const Convert<T, C> convert_value(value, value_cache, value_scale, "value_scale");
      torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
        auto turns = rotation;
        std::vector<A> head(key.size(3));
        std::vector<C> narrow(key.size(3));
        slots.each(begin, end, [&](int64_t b, int64_t token, int64_t row, int64_t slot) {
          const auto write = [&](const auto& convert, const auto& turn, int64_t turned) {
            convert(b, token, row, slot, turn, turned, head, narrow);
          };
          const auto stay = [](const T*, A*) {};
          write(convert_value, stay, 0);
          if (!turns) return write(convert_key, stay, 0);
          turns->at(b, token, [&](const auto& turn) { write(convert_key, turn, turns->width()); });
        });
      });
    });
  });
}

void append_kv(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
               const Tensor& positions) {
  append_kv_full(key, value, key_cache, value_cache, positions, {}, {}, {}, false, {}, {});
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("append_kv_full", TORCH_BOX(&append_kv_full));
}

}  // namespace
}  // namespace aigc_fast

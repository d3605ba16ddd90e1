// Writes the keys and values of new tokens into preallocated caches.
#include "attention_shape.h"

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

void check(const Tensor& source, const Tensor& cache, const Tensor& like, const char* name) {
  require(source.dim() == 4 && cache.dim() == 4, name, " and its cache must have 4 dimensions");
  for (int d : {2, 3})
    require(source.size(d) == cache.size(d), name, " must have the heads of its cache");
  require(cache.size(0) == like.size(0) && cache.size(1) == like.size(1),
          "caches must have the same shape");
  require(source.scalar_type() == like.scalar_type() && cache.scalar_type() == like.scalar_type(),
          name, " must have the dtype of the caches");
  for (int d = 0; d < 4; ++d)
    require(cache.stride(d) != 0 || cache.size(d) <= 1, name, "_cache must not be expanded");
}

void append_kv_full(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
                    const Tensor& positions, const std::optional<Tensor>& table) {
  check(key, key_cache, key_cache, "key");
  check(value, value_cache, key_cache, "value");
  require(same_shape(key, value), "value must have the shape of key");
  const int64_t batch = key.size(0), q_len = key.size(1);
  const Pages pages = table ? Pages(*table, key_cache, batch) : Pages();
  require(table || key_cache.size(0) == batch, "the caches must have the batch of key");
  const int64_t capacity = key_cache.size(1) * (table ? table->size(1) : 1);
  require(q_len <= capacity, "key must not have more tokens than the caches have room for");
  const bool wide = positions.scalar_type() == ScalarType::Long;
  require(positions.dim() == 1 && positions.size(0) == batch, "positions must have shape (batch,)");
  require(wide || positions.scalar_type() == ScalarType::Int, "positions must be int32 or int64");
  dispatch(key, "key", [](auto) {});
  const auto position = [p = positions.const_data_ptr(), s = positions.stride(0), wide](int64_t b) {
    return wide ? static_cast<const int64_t*>(p)[b * s] : static_cast<const int32_t*>(p)[b * s];
  };
  // Nothing is written unless everything can be.
  for (int64_t b = 0; b < batch && q_len > 0; ++b) {
    const int64_t first = position(b);
    require(first >= 0 && first <= capacity - q_len,
            "positions must lie in [0, capacity - q_len] = [0, ", capacity - q_len, "], got ",
            first, " for sequence ", b);
    if (table) pages.check(b, first, first + q_len, key_cache.size(0));
  }
  const Copy copy_key(key, key_cache), copy_value(value, value_cache);
  const int64_t grain =
      std::max<int64_t>(1, kGrain / std::max<int64_t>(1, key.size(2) * key.size(3)));
  torch::stable::parallel_for(0, batch * q_len, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / q_len, token = i % q_len, entry = position(b) + token;
      const int64_t row = table ? pages.at(b, entry / pages.size) : b;
      const int64_t slot = table ? entry % pages.size : entry;
      copy_key(b, token, row, slot);
      copy_value(b, token, row, slot);
    }
  });
}

void append_kv(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
               const Tensor& positions) {
  append_kv_full(key, value, key_cache, value_cache, positions, {});
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("append_kv_full", TORCH_BOX(&append_kv_full));
}

}  // namespace
}  // namespace aigc_fast

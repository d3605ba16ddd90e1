// The next token of each row of logits: what the operator does around sampler.h.
#pragma GCC optimize("fp-contract=off")  // see gumbel.h; before anything is included

#include "rows.h"
#include "sampler.h"

namespace aigc_fast {
namespace {

void check(const Settings& s, int64_t row) {
  struct Limit {
    const char* name;
    float value, least, greatest;
  };
  constexpr float kMost = std::numeric_limits<float>::max();
  for (const Limit& l : {Limit{"temperature", s.temperature, 0, kMost},
                         {"top_k", s.top_k, 0, kMost},
                         {"top_p", s.top_p, 0, 1},
                         {"min_p", s.min_p, 0, 1},
                         {"typical_p", s.typical_p, 0, 1},
                         {"repetition_penalty", s.repetition, 1e-6f, 1e6f},
                         {"presence_penalty", s.presence, -1e6f, 1e6f},
                         {"frequency_penalty", s.frequency, -1e6f, 1e6f}})
    require(l.value >= l.least && l.value <= l.greatest, l.name, " must be from ", l.least, " to ",
            l.greatest == kMost ? kInfinity : l.greatest, ", got ", l.value, " in row ", row);
}

// Penalties and mask of one row, in place.
void process(float* x, int64_t vocab, const Settings& s, const int32_t* counts, const bool* allowed,
             const uint32_t* packed) {
  const float inverse = 1 / s.repetition;
  if (counts)
    for (int64_t i = 0; i < vocab; ++i) {
      if (counts[i] != 0) x[i] *= x[i] > 0 ? inverse : s.repetition;
      if (counts[i] > 0) x[i] = (x[i] - float(counts[i]) * s.frequency) - s.presence;
    }
  if (allowed)
    for (int64_t i = 0; i < vocab; ++i) x[i] = allowed[i] ? x[i] : -kInfinity;
  if (packed)
    for (int64_t i = 0; i < vocab; ++i) x[i] = packed[i / 32] >> (i % 32) & 1 ? x[i] : -kInfinity;
}

// Of each row: its own, or the same for all.
std::vector<Settings> read_settings(const std::vector<double>& settings,
                                    const std::optional<Rows>& rows, int64_t batch) {
  require(rows || settings.size() == kSettings, "settings must have ", kSettings, " values");
  std::vector<Settings> each(batch);
  static_assert(sizeof(Settings) == kSettings * sizeof(float));
  for (int64_t r = 0; r < batch; ++r) {
    float values[kSettings];
    for (int i = 0; i < kSettings; ++i)
      values[i] = rows ? rows->at<float>(r)[i] : static_cast<float>(settings[i]);
    std::memcpy(&each[r], values, sizeof values);
    check(each[r], r);
  }
  return each;
}

std::tuple<Tensor, Tensor> sample_tokens(const Tensor& logits_in, std::vector<double> settings,
                                         const MaybeTensor& rows_in, const MaybeTensor& counts_in,
                                         const MaybeTensor& allowed_in, const Tensor& seeds_in,
                                         const Tensor& steps_in) {
  require(logits_in.dim() == 2, "logits must have 2 dimensions");
  const int64_t batch = logits_in.size(0), vocab = logits_in.size(1);
  require(vocab > 0 && vocab <= 1 << 22, "logits must have from 1 to 2^22 columns");
  auto per_row = [&](const Tensor& t, const char* name) {
    require(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == batch, name,
            " must be int64 of shape (batch,)");
    return as_contiguous(t);
  };
  const Tensor seeds = per_row(seeds_in, "seeds"), steps = per_row(steps_in, "steps");
  auto matrix = [&](const Tensor& t, const char* name, ScalarType dtype, int64_t width) {
    require(t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == batch && t.size(1) == width,
            name, " has a wrong dtype or shape");
    return as_rows(t);
  };
  std::optional<Rows> rows, counts, allowed;
  if (rows_in) rows = matrix(*rows_in, "settings", ScalarType::Float, kSettings);
  if (counts_in) counts = matrix(*counts_in, "token_counts", ScalarType::Int, vocab);
  bool packed = false;
  if (allowed_in) {
    packed = allowed_in->scalar_type() == ScalarType::Int;
    allowed = matrix(*allowed_in, "allowed", packed ? ScalarType::Int : ScalarType::Bool,
                     packed ? (vocab + 31) / 32 : vocab);
  }
  const std::vector<Settings> each = read_settings(settings, rows, batch);

  const Rows logits = as_rows(logits_in);
  Tensor tokens = empty({batch}, ScalarType::Long), logprobs = empty({batch}, ScalarType::Float);
  int64_t* token_out = mutable_data<int64_t>(tokens);
  float* logprob_out = mutable_data<float>(logprobs);
  dispatch(logits_in, "logits", [&]<class T>(T) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      static thread_local Sampler sampler;
      static thread_local std::vector<float> copy;
      for (int64_t r = begin; r < end; ++r) {
        const T* raw = logits.at<T>(r);
        const float* x;
        if constexpr (std::is_same_v<T, float>) x = raw;
        if (counts || allowed || !std::is_same_v<T, float>) {
          copy.resize(vocab);
          x = copy.data();
          if constexpr (std::is_same_v<T, double>)
            std::copy_n(raw, vocab, copy.data());
          else
            convert(raw, vocab, copy.data());
        }
        token_out[r] = -1;
        if (!sampler.scan(x, vocab)) continue;
        const float top = sampler.largest, log_sum = sampler.log_sum();
        if (counts || allowed) {
          process(copy.data(), vocab, each[r], counts ? counts->at<int32_t>(r) : nullptr,
                  allowed && !packed ? allowed->at<bool>(r) : nullptr,
                  allowed && packed ? allowed->at<uint32_t>(r) : nullptr);
          if (!sampler.scan(x, vocab)) continue;
        }
        const int64_t token =
            sampler.sample(each[r], data<int64_t>(seeds)[r], data<int64_t>(steps)[r]);
        const float own = static_cast<float>(load_one(raw + token));
        token_out[r] = token;
        logprob_out[r] = (own - top) - log_sum;
      }
    });
  });
  // Not from inside the threads: an exception cannot leave them.
  for (int64_t r = 0; r < batch; ++r)
    require(token_out[r] >= 0,
            "logits must have no NaN or +inf and at least one allowed finite value in each row, "
            "row ",
            r, " has not");
  return {tokens, logprobs};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace
}  // namespace aigc_fast

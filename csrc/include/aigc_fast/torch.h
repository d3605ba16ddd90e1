// What the operators of every device need of torch, through LibTorch's stable ABI.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace aigc_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Refuses a call. Python turns the message into ValueError or TypeError (ops/_registry.py).
template <class... Args>
void require(bool condition, const Args&... message) {
  if (__builtin_expect(!condition, 0)) {
    std::ostringstream text;
    text << "ValueError: ";
    (text << ... << message);
    throw std::runtime_error(text.str());
  }
}

}  // namespace aigc_fast

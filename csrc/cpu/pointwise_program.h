// A program of elementwise instructions, read; aigc_fast/ops/pointwise_program.py says how it is
// written.
#pragma once

#include <cmath>

#include "tensor.h"

namespace aigc_fast {

// Of two values, then of a value and a scalar.
enum Code { kAdd, kSub, kMul, kDiv, kScalar, kClamp = 8, kTo, kReturn };

struct Instruction {
  int code, a, b;              // a and, with two of them, b are values
  double first = 0, last = 0;  // scalars; clamp has two
  ScalarType dtype{};          // of the result
  bool of_two() const { return code < kScalar; }
};

struct Value {
  ScalarType dtype;
  int last_use = -1;  // the instruction that reads it last; behind all of them if it is returned
  int result = -1, slot = -1;
};

constexpr int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

class Program {
 public:
  Program(const std::vector<Tensor>& inputs, const std::vector<int64_t>& code,
          const std::vector<double>& scalars) {
    for (const Tensor& x : inputs) values.push_back({x.scalar_type()});
    for (const int64_t number : code) {
      const auto operand = [=](int i) { return static_cast<int>(number >> (4 + 12 * i) & 4095); };
      const auto scalar = [&](int i) {
        require(operand(i) < static_cast<int>(scalars.size()), "program names no scalar");
        return scalars[operand(i)];
      };
      Instruction k{static_cast<int>(number & 15), operand(0), operand(1)};
      use(k.a);
      if (k.code == kReturn) {
        Value& value = values[k.a];
        require(k.a >= static_cast<int>(inputs.size()) && value.result < 0,
                "program must return results of instructions, each once");
        value.result = results++;
        continue;
      }
      require(k.code < kReturn && !results, "program has no such instruction");
      k.dtype = values[k.a].dtype;
      if (k.of_two()) {
        use(k.b);
        if (values[k.b].dtype != k.dtype) k.dtype = ScalarType::Float;
      } else if (k.code == kTo) {
        require(k.b < 4, "program has no such dtype");
        k.dtype = kDtypes[k.b];
      } else {
        k.first = scalar(1);
        if (k.code == kClamp) k.last = scalar(2);
        require(k.code != kClamp || !(std::isnan(k.first) || std::isnan(k.last)),
                "scalars of clamp must not be NaN");
      }
      instructions.push_back(k);
      values.push_back({k.dtype});
    }
    require(results > 0, "program must return something");
    require_one_arithmetic();
    place(inputs.size());
  }

  std::vector<Instruction> instructions;
  std::vector<Value> values;  // inputs, then the result of each instruction
  int results = 0, slots = 0;

 private:
  static constexpr ScalarType kDtypes[] = {ScalarType::Double, ScalarType::Float,
                                           ScalarType::BFloat16, ScalarType::Half};

  void use(int value) {
    require(value < static_cast<int>(values.size()), "program names no value");
    values[value].last_use = instructions.size();
  }

  void require_one_arithmetic() const {
    bool has[3] = {};
    for (const Value& v : values)
      if (v.dtype != ScalarType::Float)
        has[v.dtype == ScalarType::Double ? 0 : v.dtype == ScalarType::Half ? 1 : 2] = true;
    const bool has_float = std::any_of(values.begin(), values.end(),
                                       [](const Value& v) { return v.dtype == ScalarType::Float; });
    require(has[0] + has[1] + has[2] <= 1 && !(has[0] && has_float),
            "program must compute in float64, or in float32 and one dtype of 16 bits");
  }

  // A slot for every value that stays in the cache. That of an operand is free after its last use,
  // and not for the result itself, whose elements may be wider.
  void place(size_t inputs) {
    std::vector<int> free;
    for (size_t i = 0; i < instructions.size(); ++i) {
      Value& out = values[inputs + i];
      if (out.result < 0) {
        if (free.empty()) free.push_back(slots++);
        out.slot = free.back();
        free.pop_back();
      }
      const Instruction& k = instructions[i];
      const auto release = [&](Value& v) {
        if (v.slot >= 0 && v.last_use <= static_cast<int>(i)) free.push_back(v.slot);
      };
      release(values[k.a]);
      if (k.of_two() && k.b != k.a) release(values[k.b]);
      release(out);  // of an instruction that nobody needs
    }
  }
};

}  // namespace aigc_fast

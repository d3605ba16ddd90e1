// Quantised weights as rows of 4-bit codes, two to a byte, in and out of numpy arrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace aigc_fast {

namespace py = pybind11;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

// (rows, columns) codes 0..15 -> (rows, columns / 2): byte j of a row holds column 2j in its low
// and column 2j + 1 in its high nibble.
inline Bytes pack_int4(const Bytes& codes) {
  if (codes.ndim() != 2 || codes.shape(1) % 2)
    throw py::value_error("codes must have shape (rows, columns) with an even number of columns");
  const py::ssize_t rows = codes.shape(0), half = codes.shape(1) / 2;
  Bytes packed({rows, half});
  const uint8_t* in = codes.data();
  uint8_t* out = packed.mutable_data();
  for (py::ssize_t i = 0; i < rows * half; ++i) {
    if ((in[2 * i] | in[2 * i + 1]) > 15)
      throw py::value_error("codes must be in [0, 15], got " +
                            std::to_string(std::max(in[2 * i], in[2 * i + 1])));
    out[i] = in[2 * i] | in[2 * i + 1] << 4;
  }
  return packed;
}

inline Bytes unpack_int4(const Bytes& packed) {
  if (packed.ndim() != 2) throw py::value_error("packed must have shape (rows, columns / 2)");
  const py::ssize_t rows = packed.shape(0), half = packed.shape(1);
  Bytes codes({rows, 2 * half});
  const uint8_t* in = packed.data();
  uint8_t* out = codes.mutable_data();
  for (py::ssize_t i = 0; i < rows * half; ++i) {
    out[2 * i] = in[i] & 15;
    out[2 * i + 1] = in[i] >> 4;
  }
  return codes;
}

inline void bind_packing(py::module_& m) {
  m.def("pack_int4", &pack_int4, py::arg("codes"),
        "uint8 (rows, columns) of 0..15 -> uint8 (rows, columns / 2), low nibble first");
  m.def("unpack_int4", &unpack_int4, py::arg("packed"), "the inverse of pack_int4");
}

}  // namespace aigc_fast

// aigc_fast._host: what the Python side asks of the machine and of this build. No torch here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <aigc_fast/cpu_features.h>
#include "packing.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features, build information and weight packing.";
  m.def("cpu_features", &aigc_fast::cpu_features,
        "dict of instruction-set extensions: True where the CPU has it and the system keeps its "
        "registers (CPUID and XGETBV)");
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = AIGC_FAST_TORCH_VERSION;
    info["cpu_levels"] = AIGC_FAST_CPU_LEVELS;
    info["cuda_archs"] = AIGC_FAST_CUDA_ARCHS;
    info["compiler"] = __VERSION__;
    return info;
  });
  aigc_fast::bind_packing(m);
}

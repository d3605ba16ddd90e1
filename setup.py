"""Builds the compiled parts of aigc_fast with ninja.

    aigc_fast/lib/cpu_<level>.so   csrc/cpu, once per instruction-set level
    aigc_fast/lib/cuda.so          csrc/cuda, wherever nvcc is found
    aigc_fast/_host.<abi>.so       csrc/host, the pybind11 module

The first two hold operators against LibTorch's stable ABI and are opened by
torch.ops.load_library: they know neither Python nor a torch newer than 2.11.

AIGC_FAST_CUDA=auto|0|1    auto builds the CUDA library where nvcc is found; 1 demands it
TORCH_CUDA_ARCH_LIST       CUDA architectures, "8.0;9.0a" if unset
AIGC_FAST_CPU_LEVELS       instruction-set levels to build, "avx512" or "avx2 baseline";
                           all if unset, as in a wheel: it shall run on other machines too
AIGC_FAST_PYTHONS          further interpreters that the wheel shall serve, "python3.10 python3.12":
                           only the pybind11 module depends on one, and is built once for each
AIGC_FAST_SANITIZE=1       AddressSanitizer and UndefinedBehaviorSanitizer in csrc/cpu, level avx2
"""

import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Explicit instruction sets, never -march=native: a wheel built here runs elsewhere. What runs on
# processors from before 2013 is to be right and not more: -O1 compiles in 60% of the time.
X86_LEVELS = {
    "baseline": "-march=x86-64 -O1",
    "avx2": "-march=x86-64 -mavx2 -mfma -mf16c",
    "avx512": "-march=x86-64 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    " -mavx512vnni -mprefer-vector-width=512",
}
SANITIZE = os.environ.get("AIGC_FAST_SANITIZE") == "1"


def cpu_levels() -> dict[str, str]:
    """Level -> its compiler flags, of the levels to be built."""
    known = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
    wish = "avx2" if SANITIZE else os.environ.get("AIGC_FAST_CPU_LEVELS", "")
    names = wish.replace(",", " ").split() or list(known)
    if unknown := set(names) - set(known):
        raise SystemExit(f"AIGC_FAST_CPU_LEVELS must be among {list(known)}, got {unknown}")
    return {name: known[name] for name in names}


CPU_LEVELS = cpu_levels()

# The uninitialized warnings fire inside GCC 12's own intrinsics headers.
CXX_FLAGS = (
    "-std=c++20 -O2 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
    " -Wno-unused-parameter -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
)
# LibTorch 2.11's stable ABI, and nothing newer.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def find_nvcc() -> str | None:
    """Path of nvcc, or None where the CUDA library is not to be built."""
    wish = os.environ.get("AIGC_FAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"AIGC_FAST_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and wish == "1":
        raise SystemExit("AIGC_FAST_CUDA=1, but no nvcc: put it on PATH or set CUDA_HOME")
    return nvcc


def cuda_archs() -> list[str]:
    """Architectures in the style of torch's own extensions: "8.0", "9.0a", "9.0+PTX"."""
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0a").replace(" ", ";").split(";")


def cuda_arch_flags() -> str:
    """nvcc -gencode flags."""
    flags = []
    for arch in cuda_archs():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


@dataclass(frozen=True)
class Interpreter:
    """What the pybind11 module needs to know of a Python."""

    include: str
    suffix: str  # ".cpython-311-x86_64-linux-gnu.so"
    tag: str  # "cp311"


@functools.cache
def interpreters() -> dict[str, Interpreter]:
    """This Python and those of AIGC_FAST_PYTHONS, by tag."""
    ask = (
        "import sys, sysconfig; print(sysconfig.get_paths()['include'],"
        " sysconfig.get_config_var('EXT_SUFFIX'), 'cp%d%d' % sys.version_info[:2])"
    )
    found = {}
    for python in [sys.executable, *os.environ.get("AIGC_FAST_PYTHONS", "").split()]:
        answer = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
        interpreter = Interpreter(*answer.stdout.split())
        found[interpreter.tag] = interpreter
    return found


class Library:
    """Where one shared library comes from: sources, a ninja rule each, and the link."""

    def __init__(self, name, sources, compile_rule, link_rule, flags=""):
        self.name, self.flags = name, flags
        self.compile_rule, self.link_rule = compile_rule, link_rule
        self.sources = sorted(CSRC.glob(sources))


def libraries() -> list[Library]:
    """What this machine can build."""
    nvcc = find_nvcc()
    found = [
        Library(f"aigc_fast.lib.cpu_{level}", "cpu/*.cpp", "cxx", "link", flags)
        for level, flags in CPU_LEVELS.items()
    ]
    if nvcc:
        found.append(Library("aigc_fast.lib.cuda", "cuda/*.cu", "nvcc", "link_cuda"))
    for tag, python in interpreters().items():
        include = f"-isystem {python.include}"
        name = f"aigc_fast._host_{tag}"
        found.append(Library(name, "host/*.cpp", "cxx_host", "link_host", include))
    return found


def ninja_file(build: Path, libs: list[Library]) -> str:
    """The whole build as a ninja file: incremental, parallel, headers tracked."""
    return ninja_rules(build) + "".join(ninja_builds(build, lib) for lib in libs)


def ninja_rules(build: Path) -> str:
    """How the compilers and linkers are called."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    torch_includes = " ".join(f"-isystem {p}" for p in include_paths())
    torch_link = " ".join(f"-L{p}" for p in library_paths()) + " -ltorch -ltorch_cpu -lc10"
    sanitize = ""
    if SANITIZE:  # checks that are calls, and none of null and alignment: a sixth of the compiling
        sanitize = (
            "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined"
            " -fno-sanitize=null,alignment,object-size,vptr"
            " --param asan-instrumentation-with-call-threshold=0"
        )
    cxx = os.environ.get("CXX", "g++")
    nvcc = find_nvcc() or "nvcc"
    host_flags = " ".join(
        [f"-isystem {pybind11.get_include()}"]
        + [
            f'-DAIGC_FAST_{key}=\\"{value}\\"'
            for key, value in {
                "TORCH_VERSION": torch.__version__,
                "CPU_LEVELS": ",".join(CPU_LEVELS),
                "CUDA_ARCHS": ",".join(cuda_archs()) if find_nvcc() else "",
            }.items()
        ]
    )
    compile_command = "$flags -MMD -MF $out.d -c $in -o $out"
    paths = f"-I{CSRC / 'include'} -ffile-prefix-map={ROOT}=."
    return f"""
ninja_required_version = 1.5
builddir = {build}
rule cxx
  command = {cxx} {CXX_FLAGS} {TORCH_TARGET} {sanitize} {paths} {torch_includes} {compile_command}
  depfile = $out.d
  deps = gcc
rule header
  command = {cxx} {CXX_FLAGS} {TORCH_TARGET} {sanitize} {paths} {torch_includes} -x c++-header $
    {compile_command}
  depfile = $out.d
  deps = gcc
rule cxx_host
  command = {cxx} {CXX_FLAGS} {paths} {host_flags} {compile_command}
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr --threads 2 $
    {cuda_arch_flags()} -Xcompiler=-fPIC,-fvisibility=hidden {TORCH_TARGET} -DUSE_CUDA $
    -I{CSRC / "include"} {torch_includes} -Xptxas=-v -c $in -o $out
rule link
  command = {cxx} -shared {sanitize} $in -o $out {torch_link}
rule link_cuda
  command = {nvcc} -shared -cudart=static -Xlinker=--no-as-needed $in -o $out {torch_link}
rule link_host
  command = {cxx} -shared $in -o $out
"""


def ninja_builds(build: Path, lib: Library) -> str:
    """What of one library is made of what."""
    text, objects, flags, needs = "", [], lib.flags, ""
    if lib.compile_rule == "cxx":
        header = f"{build}/{lib.name}/precompiled.h"
        text += f"build {header}.gch: header {CSRC}/cpu/precompiled.h\n  flags = {flags}\n"
        flags, needs = f"{flags} -include {header}", f"| {header}.gch"
    if lib.compile_rule == "nvcc":
        # nvcc --threads 2 may leave its own list of them empty.
        headers = [*CSRC.glob("cuda/*.*h"), *CSRC.glob("include/aigc_fast/*.h")]
        needs = "| " + " ".join(map(str, sorted(headers)))
    for source in lib.sources:
        objects.append(f"{build}/{lib.name}/{source.stem}.o")
        text += f"build {objects[-1]}: {lib.compile_rule} {source} {needs}\n"
        text += f"  flags = {flags}\n"
    return f"{text}build {build}/{lib.name}.so: {lib.link_rule} {' '.join(objects)}\n"


class NinjaBuild(build_ext):
    """build_ext that leaves the compiling to ninja and only places the results."""

    def get_ext_filename(self, fullname):
        # _host_cp311 takes the suffix of its interpreter; the operator libraries are no modules.
        *package, name = fullname.split(".")
        if name.startswith("_host_"):
            name = "_host" + interpreters()[name.removeprefix("_host_")].suffix
        else:
            name += ".so"
        return os.path.join(*package, name)

    def run(self):
        self.ninja_build = ROOT / "build" / ("sanitize" if SANITIZE else "release")
        self.ninja_build.mkdir(parents=True, exist_ok=True)
        file = self.ninja_build / "build.ninja"
        text = ninja_file(self.ninja_build, libraries())
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        subprocess.run(["ninja", "-f", str(file)], check=True)
        (ROOT / "aigc_fast" / "lib").mkdir(exist_ok=True)  # an editable install copies to it
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not a rewrite: a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(self.ninja_build / f"{ext.name}.so", target)


class Wheel(bdist_wheel):
    """A wheel that names every interpreter it has a _host for."""

    def get_tag(self):
        tags = ".".join(sorted(interpreters()))
        return tags, tags, super().get_tag()[2]


setup(
    ext_modules=[
        Extension(lib.name, [str(path.relative_to(ROOT)) for path in lib.sources])
        for lib in libraries()
    ],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Wheel},
)

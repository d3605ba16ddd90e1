"""Every .cu file compiles for each architecture without spills, into the instructions it is for."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[2] / "csrc"
#: what must be in the machine code, as regular expressions, beside "no spills"
INSTRUCTIONS = {
    # cp.async of 16 bytes past the L1 cache, and 16-byte loads of what it brought
    "decode_attention": (r"LDGSTS\S*\.BYPASS\S*\.128", r"LDS\S*\.128", r"SHFL\.BFLY"),
    # the same, and tensor cores for each type of activations
    "quantized_linear": (
        r"LDGSTS\S*\.BYPASS\S*\.128",
        r"LDS\S*\.128",
        r"HMMA\.16816\.F32\.BF16",
        r"HMMA\.16816\.F32 ",
        r"IMMA\.16832\.S8\.S8",
    ),
}


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not on PATH: no CUDA source can be compiled here")
    return found


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton, whose wheel holds cuobjdump, is not installed")
    return str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_no_spills(source: Path, arch: str, nvcc: str, cuobjdump: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    includes = [f"-I{CSRC / 'include'}", *(f"-isystem={path}" for path in include_paths())]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    done = subprocess.run(
        [
            nvcc,
            "-cubin",
            f"-arch={arch}",
            "-Xptxas=-v",
            *flags,
            target,
            *includes,
            source,
            "-o",
            cubin,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and all(spill == ("0", "0") for spill in spills), done.stderr[-3000:]
    dump = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True)
    for instruction in INSTRUCTIONS.get(source.stem, ()):
        assert re.search(instruction, dump.stdout), f"no {instruction}"

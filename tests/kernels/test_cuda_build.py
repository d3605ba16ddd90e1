"""The CUDA library's machine code, as it was built: no spills, and the instructions it is for."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import aigc_fast

LIBRARY = Path(aigc_fast.__file__).parent / "lib" / "cuda.so"
#: kernel -> what must be in its machine code, as regular expressions
INSTRUCTIONS = {
    # cp.async of 16 bytes past the L1 cache, and 16-byte loads of what it brought
    "attend_kernel": (r"LDGSTS\S*\.BYPASS\S*\.128", r"LDS\S*\.128", r"SHFL\.BFLY"),
    "gemv_kernel": (r"LDGSTS\S*\.BYPASS\S*\.128", r"LDS\S*\.128"),
    # tensor cores for each type of activations
    "gemv_kernelI6__half": (r"HMMA\.16816\.F32 ",),
    "gemv_kernelI13__nv_bfloat16": (r"HMMA\.16816\.F32\.BF16",),
    "gemv_kernelIa": (r"IMMA\.16832\.S8\.S8",),
}


def dump(what: str, arch: str) -> dict[str, str]:
    """What cuobjdump says of each kernel that was built for `arch`."""
    if not LIBRARY.exists():
        pytest.skip("the CUDA library is not built: nvcc was not found")
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton, whose wheel holds cuobjdump, is not installed")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def run(*arguments: str) -> str:
        command = [tool, *arguments, LIBRARY]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if f".{arch}.cubin" not in run("-lelf"):
        pytest.skip(f"the CUDA library is not built for {arch}")
    _, *parts = re.split(r"Function ?:? (?=_Z)", run(what, "-arch", arch))
    kernels = {part.split(None, 1)[0].rstrip(":"): part for part in parts}
    assert kernels, "no kernel in what cuobjdump says"
    return kernels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_spills(arch) -> None:
    for name, usage in dump("-res-usage", arch).items():
        assert re.search(r"STACK:0 .*LOCAL:0 ", usage), f"{name}: {usage}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_instructions(arch) -> None:
    code = dump("-sass", arch)
    for kernel, instructions in INSTRUCTIONS.items():
        bodies = {name: body for name, body in code.items() if kernel in name}
        assert bodies, kernel
        for name, body in bodies.items():
            for instruction in instructions:
                assert re.search(instruction, body), f"no {instruction} in {name}"

"""Compiles every Triton kernel for GPUs that are not there, and prints what each one takes.

The launchers themselves run, on CPU tensors from the table of samples, with launching replaced by
compiling: what is checked is what a GPU would get. Run as a process of its own, because Triton's
interpreter must be off:

    python -m tests.kernels.compile_ahead 90 [operator ...]  ->  JSON list
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from aigc_fast.ops import _registry
from tests.op_samples import OPS
from tests.ops.test_every_op import call, cast, contiguous_grad, gradients, variables

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Within the block kernels are compiled for sm_<arch>, not launched; yields the results."""
    compiled: dict[str, Any] = {}

    def compile_only(self: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            compiled[kernel.hash] = (Path(self.fn.__code__.co_filename).stem, kernel)

        return launch

    launch_kernel = JITFunction.__getitem__
    driver.set_active(AbsentGPU(arch))
    JITFunction.__getitem__ = compile_only
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = launch_kernel


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory, as cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def twice(op: Any, args: tuple, kwargs: dict) -> None:
    """Forward, backward and double backward."""
    inputs = [t.requires_grad_() for t in variables(op, args, kwargs)]
    outputs = [t for t in call(op, args, kwargs) if t.requires_grad]
    first = torch.autograd.grad(
        outputs,
        inputs,
        [contiguous_grad(t, 0) for t in outputs],
        create_graph=True,
        allow_unused=True,
    )
    first = [t for t in first if t is not None and t.requires_grad]
    if first:
        torch.autograd.grad(first, inputs, first, allow_unused=True)


def main(arch: int, names: list[str]) -> None:
    def launch(op: _registry.Op, args: tuple) -> Any:
        op.check(*args)
        return op._call_triton(*args)

    with compiling(arch) as compiled, _registry._intercepting(launch):
        for name in names or OPS:
            op = OPS[name]
            # sm_90 gets every call, its neighbours a few of each operator.
            samples = op.samples() if arch == 90 else op.samples()[::8]
            for sample in samples:
                args, kwargs = cast((sample.args, sample.kwargs), torch.bfloat16)
                if op.derivatives and sample.differentiable:
                    gradients(op, args, kwargs, contiguous_grad)
                    if op.derivatives > 1:
                        twice(op, *cast((sample.args, sample.kwargs), torch.bfloat16))
                else:
                    with torch.no_grad():
                        call(op, args, kwargs)
    rows = [
        {
            "stem": stem,
            "kernel": kernel.metadata.name,
            "shared": kernel.metadata.shared,
            "wide_loads": ".v4" in kernel.asm["ptx"] or ".v2" in kernel.asm["ptx"],
            **resources(kernel.asm["cubin"]),
        }
        for stem, kernel in compiled.values()
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

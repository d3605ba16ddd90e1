"""Compiles every Triton kernel for GPUs that are not there, and prints what each one takes.

The launchers themselves run, on CPU tensors from the table of samples, with launching replaced by
compiling: what is checked is what a GPU would get. Run as a process of its own, because Triton's
interpreter must be off:

    python -m tests.kernels.compile_ahead 90 [operator ...] [--most N]  ->  JSON list
"""

import argparse
import contextlib
import json
import re
import subprocess
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
from tests.ops.test_every_op import call, cast, contiguous_grad, gradients, tensors, variables

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
def collecting() -> Iterator[dict[JITFunction, list[tuple]]]:
    """Within the block launches are noted, not made; yields kernel -> (grid, args, kwargs)."""
    launches: dict[JITFunction, list[tuple]] = {}

    def note(self: JITFunction, grid: Any) -> Any:
        return lambda *args, **kwargs: launches.setdefault(self, []).append((grid, args, kwargs))

    launch_kernel = JITFunction.__getitem__
    JITFunction.__getitem__ = note
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = launch_kernel


def compile_some(launches: dict[JITFunction, list[tuple]], most: int | None) -> list[tuple]:
    """(stem, compiled kernel) of at most so many launches of each kernel, evenly spread."""
    compiled: dict[str, tuple] = {}
    for kernel, calls in launches.items():
        count = len(calls) if most is None else min(most, len(calls))
        for i in range(count):
            # The last launches of a kernel are those of its largest samples: begin there.
            grid, args, kwargs = calls[len(calls) - 1 - i * len(calls) // count]
            result = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            compiled[result.hash] = (Path(kernel.fn.__code__.co_filename).stem, result)
    return list(compiled.values())


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


def main(arch: int, names: list[str], most: int | None) -> None:
    def launch(op: _registry.Op, args: tuple) -> Any:
        op.check(*args)
        if op.stem is None:
            return op.reference(*args)  # it has no Triton kernel
        out = op._call_triton(*args)
        for t in tensors(out):
            if t.dtype == torch.int64:  # indices that no kernel wrote would point anywhere
                t.zero_()
        return out

    driver.set_active(AbsentGPU(arch))
    with collecting() as launches, _registry._intercepting(launch):
        for name in names or OPS:
            op = OPS[name]
            for sample in op.samples():
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
        for stem, kernel in compile_some(launches, most)
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int)
    parser.add_argument("operators", nargs="*")
    parser.add_argument("--most", type=int, help="launches of a kernel to compile; default: all")
    options = parser.parse_args()
    main(options.arch, options.operators, options.most)

"""silu(gate) * up and its derivative. Gate and up are rows at strides of their own, so that halves
of a packed projection need no copy. One program takes a tile of ROWS x BLOCK."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows, tile

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (64, 0), "_backward": (72, 0)}

_TILE = 1024


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of this program's tile, and its mask."""
    across = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // across * ROWS + tl.arange(0, ROWS))[:, None]
    col = (pid % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, col, (row < rows) & (col < width)


@triton.jit
def _forward(
    gate_ptr, up_ptr, y_ptr, rows, width, gate_stride, up_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(rows, width, ROWS, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, 0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, width, dy_stride, gate_stride, up_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(rows, width, ROWS, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    at = row * width + col
    dgate = dy * up * (s * (1.0 + gate * (1.0 - s)))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + at, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


def _launch(kernel, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    if not outputs[0].numel():
        return
    matrices = [as_rows(x) for x in inputs]
    rows, width = matrices[0].shape
    options = tile(rows, width, _TILE)
    grid = (triton.cdiv(rows, options["ROWS"]) * triton.cdiv(width, options["BLOCK"]),)
    kernel[grid](*matrices, *outputs, rows, width, *(m.stride(0) for m in matrices), **options)


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = _new(gate)
    _launch(_forward, [gate, up], [y])
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _new(gate), _new(up)
    _launch(_backward, [dy, gate, up], [dgate, dup])
    return dgate, dup

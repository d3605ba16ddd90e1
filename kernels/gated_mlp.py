"""act(gate) * up and its derivative, act being silu or one of the two gelus.

Gate and up are rows at strides of their own, so that halves of a packed projection need no copy.
One program takes a tile of ROWS x BLOCK.
"""

import triton
import triton.language as tl
from torch import Tensor

from .bias_tiles import tile
from .memory_order import contiguous_like
from .rows import as_rows
from .rows import tile as sizes
from .smooth_activation import activate

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (64, 0), "_backward": (80, 0)}

_TILE = 1024
_SILU, _GELU, _GELU_TANH = 0, 1, 2


@triton.jit
def _forward(
    gate_ptr, up_ptr, y_ptr, rows, width, gate_stride, up_stride,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, width, ROWS, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, 0.0).to(tl.float32)
    y, _ = activate(gate, ACT)
    tl.store(y_ptr + at, (y * up).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, width, dy_stride, gate_stride, up_stride,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, width, ROWS, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, 0.0).to(tl.float32)
    y, slope = activate(gate, ACT)
    tl.store(dgate_ptr + at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + at, (dy * y).to(dup_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


def _launch(kernel, inputs: list[Tensor], outputs: list[Tensor], act: int) -> None:
    if not outputs[0].numel():
        return
    matrices = [as_rows(x) for x in inputs]
    rows, width = matrices[0].shape
    options = sizes(rows, width, _TILE)
    grid = (triton.cdiv(rows, options["ROWS"]) * triton.cdiv(width, options["BLOCK"]),)
    strides = (m.stride(0) for m in matrices)
    kernel[grid](*matrices, *outputs, rows, width, *strides, ACT=act, **options)


def _gated(gate: Tensor, up: Tensor, act: int) -> Tensor:
    y = contiguous_like(gate)
    _launch(_forward, [gate, up], [y], act)
    return y


def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    dgate, dup = contiguous_like(gate), contiguous_like(up)
    _launch(_backward, [dy, gate, up], [dgate, dup], act)
    return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(gate, up, _SILU)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_backward(dy, gate, up, _SILU)


def geglu(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return _gated(gate, up, _GELU_TANH if tanh else _GELU)


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return _gated_backward(dy, gate, up, _GELU_TANH if tanh else _GELU)

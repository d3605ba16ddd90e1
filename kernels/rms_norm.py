"""y = x / sqrt(mean(x^2) + eps) * weight, with or without a residual added first, and the
derivative of both.

One program takes ROWS rows. A row of up to _BLOCK columns stays in registers (SINGLE); a wider one
is read twice, block by block, the second time from the L2 cache. In backward a program takes a
fixed run of rows and leaves their part of the weight gradient in fp32; the parts are added in a
fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .memory_order import contiguous_like
from .rows import as_rows, load, tile

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (64, 8192), "_backward": (168, 16384)}

_BLOCK = 8192
_NARROW_TILE = 1024  # elements of a tile that holds several rows
_PARTS = 256  # of the weight gradient: about two programs for each SM of the largest GPUs


@triton.jit
def _load_sum(x_ptr, residual_ptr, sum_ptr, row, x_stride, residual_stride, width, col, mask):
    """x, or x + residual as its dtype rounds it, which is also stored."""
    x = load(x_ptr, row, x_stride, col, mask)
    if residual_ptr is not None:
        total = x + load(residual_ptr, row, residual_stride, col, mask)
        rounded = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + col, rounded, mask)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rows, width, x_stride, residual_stride, eps,
    SINGLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    dtype = y_ptr.dtype.element_ty
    if SINGLE:
        mask = (row < rows) & (col < width)
        x = _load_sum(x_ptr, residual_ptr, sum_ptr, row, x_stride, residual_stride, width, col, mask)  # noqa: E501  # fmt: skip
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + fp32(eps))[:, None]
        weight = tl.load(weight_ptr + col, col < width, 0.0).to(tl.float32)
        tl.store(y_ptr + row * width + col, (x * factor * weight).to(dtype), mask)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + col
            mask = (row < rows) & (at < width)
            x = _load_sum(x_ptr, residual_ptr, sum_ptr, row, x_stride, residual_stride, width, at, mask)  # noqa: E501  # fmt: skip
            squares += x * x
        factor = 1.0 / tl.sqrt(tl.sum(squares, 1) / width + fp32(eps))[:, None]
        for start in range(0, width, BLOCK):
            at = start + col
            mask = (row < rows) & (at < width)
            # The sum is formed anew: what this program stored, another thread may have written.
            x = load(x_ptr, row, x_stride, at, mask)
            if residual_ptr is not None:
                total = x + load(residual_ptr, row, residual_stride, at, mask)
                x = total.to(sum_ptr.dtype.element_ty).to(tl.float32)
            weight = tl.load(weight_ptr + at, at < width, 0.0).to(tl.float32)
            tl.store(y_ptr + row * width + at, (x * factor * weight).to(dtype), mask)


@triton.jit
def _gradient(dy, x, weight, squares, products, width, eps):
    """(dx, normed) from the sums over the row of x^2 and x dy weight."""
    factor = 1.0 / tl.sqrt(squares / width + eps)[:, None]
    normed = x * factor
    return (dy * weight - normed * (products[:, None] * factor / width)) * factor, normed


@triton.jit
def _backward(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, dx_ptr, part_ptr, rows, width, part_rows, dy_stride,
    dsum_stride, x_stride, eps, WEIGHT_GRAD: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * part_rows
    last = tl.minimum(first + part_rows, rows)
    part_ptr += tl.program_id(0).to(tl.int64) * width
    col = tl.arange(0, BLOCK)[None, :]
    eps = fp32(eps)
    dtype = dx_ptr.dtype.element_ty
    if SINGLE:
        weight = tl.load(weight_ptr + col, col < width, 0.0).to(tl.float32)
        dweight = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(first, last, ROWS):
            row = (start + tl.arange(0, ROWS))[:, None]
            mask = (row < last) & (col < width)
            x = load(x_ptr, row, x_stride, col, mask)
            dy = load(dy_ptr, row, dy_stride, col, mask)
            dx, normed = _gradient(dy, x, weight, tl.sum(x * x, 1), tl.sum(x * (dy * weight), 1), width, eps)  # noqa: E501  # fmt: skip
            if dsum_ptr is not None:
                dx += load(dsum_ptr, row, dsum_stride, col, mask)
            tl.store(dx_ptr + row * width + col, dx.to(dtype), mask)
            dweight += tl.where(mask, dy * normed, 0.0)
        if WEIGHT_GRAD:
            tl.store(part_ptr + tl.arange(0, BLOCK), tl.sum(dweight, 0), tl.arange(0, BLOCK) < width)  # noqa: E501  # fmt: skip
    else:
        for row in range(first, last):
            squares = tl.zeros([1, BLOCK], tl.float32)
            products = tl.zeros([1, BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                at = start + col
                x = load(x_ptr, row, x_stride, at, at < width)
                dy = load(dy_ptr, row, dy_stride, at, at < width)
                weight = tl.load(weight_ptr + at, at < width, 0.0).to(tl.float32)
                squares += x * x
                products += x * (dy * weight)
            row_squares, row_products = tl.sum(squares, 1), tl.sum(products, 1)
            for start in range(0, width, BLOCK):
                at = start + col
                mask = at < width
                x = load(x_ptr, row, x_stride, at, mask)
                dy = load(dy_ptr, row, dy_stride, at, mask)
                weight = tl.load(weight_ptr + at, mask, 0.0).to(tl.float32)
                dx, normed = _gradient(dy, x, weight, row_squares, row_products, width, eps)
                if dsum_ptr is not None:
                    dx += load(dsum_ptr, row, dsum_stride, at, mask)
                tl.store(dx_ptr + row * width + at, dx.to(dtype), mask)
                if WEIGHT_GRAD:
                    # Each element is read and written by the thread that wrote it for the last row.
                    before = tl.load(part_ptr + at, at < tl.where(row > first, width, 0), 0.0)
                    tl.store(part_ptr + at, before + dy * normed, mask)


# ---- launchers ------------------------------------------------------------------------------


def _options(rows: int, width: int) -> dict:
    # Widths that rule out 16-byte loads take more registers: a full block would spill.
    limit = _BLOCK if width % 16 == 0 else _BLOCK // 2
    elements = max(_NARROW_TILE, min(triton.next_power_of_2(width), limit))
    return {"SINGLE": width <= elements, **tile(rows, width, elements)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = contiguous_like(x)
    if y.numel():
        m = as_rows(x)
        options = _options(*m.shape)
        grid = (triton.cdiv(m.shape[0], options["ROWS"]),)
        _forward[grid](m, None, weight.contiguous(), y, None, *m.shape, m.stride(0), 0, float(eps),
                       **options)  # fmt: skip
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = contiguous_like(x), contiguous_like(x)
    if y.numel():
        m, r = as_rows(x), as_rows(residual)
        options = _options(*m.shape)
        grid = (triton.cdiv(m.shape[0], options["ROWS"]),)
        _forward[grid](m, r, weight.contiguous(), y, total, *m.shape, m.stride(0), r.stride(0),
                       float(eps), **options)  # fmt: skip
    return y, total


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    dx = contiguous_like(x)
    if not x.numel():
        return dx, weight.new_zeros(x.shape[-1] if weight_grad else 0)
    m, g = as_rows(x), as_rows(dy)
    s = None if dsum is None else as_rows(dsum)
    rows, width = m.shape
    options = _options(rows, width)
    part_rows = max(triton.cdiv(rows, _PARTS), options["ROWS"])
    parts = triton.cdiv(rows, part_rows)
    part = m.new_empty((parts if weight_grad else 0, width), dtype=torch.float32)
    _backward[(parts,)](g, s, m, weight.contiguous(), dx, part, rows, width, part_rows,
                        g.stride(0), 0 if s is None else s.stride(0), m.stride(0), float(eps),
                        WEIGHT_GRAD=weight_grad, **options)  # fmt: skip
    return dx, part.sum(0).to(x.dtype) if weight_grad else x.new_empty(0)

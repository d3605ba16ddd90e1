"""The adaLN chain of a diffusion transformer: residual + gate * x, its LayerNorm or RMSNorm, and
the modulation by scale and shift, each alone or together; and the derivative of all of it.

Rows of the modulation serve runs of RUN neighbouring rows of x. One program takes one row and
keeps it in registers; in backward it takes a block of rows of one run and leaves their sums for
scale, shift and gate in fp32, which are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .memory_order import contiguous_like
from .optional import contiguous, value_or
from .rows import as_rows, load

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_forward": (80, 4096),
    "_backward": (80, 4096),
    "_residual": (64, 0),
    "_residual_backward": (64, 0),
}

_BLOCKS = 1024  # of rows, in backward: several for each SM of the largest GPUs


@triton.jit
def _normed(x, width, eps, mask, RMS: tl.constexpr):
    """(x - mean) / deviation and 1 / deviation."""
    if RMS:
        centred = x
    else:
        mean = tl.sum(x) / width
        # What the mean's rounding left over goes to the mean.
        mean += tl.sum(tl.where(mask, x - mean, 0.0)) / width
        centred = tl.where(mask, x - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred) / width + fp32(eps))
    return centred * factor, factor


@triton.jit
def _forward(
    x_ptr, residual_ptr, gate_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr,
    width, run, x_stride, residual_stride, gate_stride, scale_stride, shift_stride, eps,
    RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m = row // run
    col = tl.arange(0, BLOCK)
    mask = col < width
    x = load(x_ptr, row, x_stride, col, mask)
    if gate_ptr is not None:
        x = load(residual_ptr, row, residual_stride, col, mask) + x * load(
            gate_ptr, m, gate_stride, col, mask
        )
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + col, rounded, mask)
        x = rounded.to(tl.float32)
    y, _ = _normed(x, width, eps, mask, RMS)
    y = y * value_or(weight_ptr, col, mask, 1.0) + value_or(bias_ptr, col, mask, 0.0)
    if scale_ptr is not None:
        y += y * load(scale_ptr, m, scale_stride, col, mask)
        y += load(shift_ptr, m, shift_stride, col, mask)
    tl.store(y_ptr + row * width + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy_ptr, dsum_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, dx_ptr, dbranch_ptr,
    part_ptr, width, run, block, per_run, dy_stride, dsum_stride, x_stride, branch_stride,
    gate_stride, scale_stride, eps, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    m = pid // per_run
    first = m * run + pid % per_run * block
    col = tl.arange(0, BLOCK)
    mask = col < width
    factors = value_or(weight_ptr, col, mask, 1.0)
    if scale_ptr is not None:
        factors += factors * load(scale_ptr, m, scale_stride, col, mask)
    products = tl.zeros([BLOCK], tl.float32)
    grads = tl.zeros([BLOCK], tl.float32)
    gates = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + block, (m + 1) * run)):
        dy = load(dy_ptr, row, dy_stride, col, mask)
        normed, factor = _normed(load(x_ptr, row, x_stride, col, mask), width, eps, mask, RMS)
        g = dy * factors
        dx = g - normed * (tl.sum(g * normed) / width)
        if not RMS:
            dx -= tl.sum(g) / width
        dx *= factor
        if dsum_ptr is not None:
            dx += load(dsum_ptr, row, dsum_stride, col, mask)
        tl.store(dx_ptr + row * width + col, dx.to(dx_ptr.dtype.element_ty), mask)
        products += dy * normed
        grads += dy
        if gate_ptr is not None:
            gate = load(gate_ptr, m, gate_stride, col, mask)
            dbranch = (dx * gate).to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + row * width + col, dbranch, mask)
            gates += dx * load(branch_ptr, row, branch_stride, col, mask)
    to = part_ptr + pid * 3 * width + col
    tl.store(to, products, mask)
    tl.store(to + width, grads, mask)
    if gate_ptr is not None:
        tl.store(to + 2 * width, gates, mask)


@triton.jit
def _residual(
    residual_ptr, x_ptr, gate_ptr, y_ptr, width, run, residual_stride, x_stride, gate_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < width
        y = load(residual_ptr, row, residual_stride, col, mask)
        y += load(x_ptr, row, x_stride, col, mask) * load(
            gate_ptr, row // run, gate_stride, col, mask
        )
        tl.store(y_ptr + row * width + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _residual_backward(
    dy_ptr, x_ptr, gate_ptr, dx_ptr, part_ptr, width, run, block, per_run, dy_stride, x_stride,
    gate_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    m = pid // per_run
    first = m * run + pid % per_run * block
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < width
        gate = load(gate_ptr, m, gate_stride, col, mask)
        gates = tl.zeros([BLOCK], tl.float32)
        for row in range(first, tl.minimum(first + block, (m + 1) * run)):
            dy = load(dy_ptr, row, dy_stride, col, mask)
            tl.store(dx_ptr + row * width + col, (dy * gate).to(dx_ptr.dtype.element_ty), mask)
            gates += dy * load(x_ptr, row, x_stride, col, mask)
        tl.store(part_ptr + pid * width + col, gates, mask)


# ---- launchers ------------------------------------------------------------------------------


def _maybe_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x as rows, and their stride."""
    if x is None:
        return None, 0
    rows = as_rows(x)
    return rows, rows.stride(0)


def _runs(rows: int, *modulations: Tensor | None) -> tuple[int, int]:
    """Rows of the modulation, and rows of x for each."""
    count = next((p.shape[:-1].numel() for p in modulations if p is not None), 1)
    return count, rows // max(count, 1)


def _blocks(count: int, run: int) -> tuple[int, int]:
    """Rows of a block in backward, and blocks of a run."""
    block = max(1, min(run, triton.cdiv(count * run, _BLOCKS)))
    return block, triton.cdiv(run, block)


def _row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _norm(x, residual, gate, scale, shift, weight, bias, eps, rms) -> tuple[Tensor, Tensor]:
    y = contiguous_like(x)
    total = y if gate is None else contiguous_like(x)
    if not y.numel():
        return y, total
    x, x_stride = _maybe_rows(x)
    residual, residual_stride = _maybe_rows(residual)
    _, run = _runs(x.shape[0], gate, scale)
    gate, gate_stride = _maybe_rows(gate)
    scale, scale_stride = _maybe_rows(scale)
    shift, shift_stride = _maybe_rows(shift)
    weight, bias = contiguous(weight, bias)
    _forward[(x.shape[0],)](
        x, residual, gate, scale, shift, weight, bias, y, total, x.shape[1], run, x_stride,
        residual_stride, gate_stride, scale_stride, shift_stride, float(eps),
        RMS=rms, **_row(x.shape[1]),
    )  # fmt: skip
    return y, total


def modulated_norm(x, scale, shift, weight, bias, eps, rms) -> Tensor:
    return _norm(x, None, None, scale, shift, weight, bias, eps, rms)[0]


def gated_residual_norm(
    residual, x, gate, scale, shift, weight, bias, eps, rms
) -> tuple[Tensor, Tensor]:
    return _norm(x, residual, gate, scale, shift, weight, bias, eps, rms)


def modulated_norm_backward(
    dy, dsum, x, branch, gate, scale, weight, bias, eps, rms
) -> tuple[Tensor, ...]:
    dx, dbranch = contiguous_like(x), x.new_empty(0) if gate is None else contiguous_like(x)
    width = x.shape[-1]
    rows = x.shape[:-1].numel()
    if x.numel():
        count, run = _runs(rows, gate, scale)
        block, per_run = _blocks(count, run)
        part = x.new_empty(count, per_run, 3, width, dtype=torch.float32)
        m, x_stride = _maybe_rows(x)
        grad, dy_stride = _maybe_rows(dy)
        added, dsum_stride = _maybe_rows(dsum)
        inner, branch_stride = _maybe_rows(branch)
        gates, gate_stride = _maybe_rows(gate)
        scales, scale_stride = _maybe_rows(scale)
        _backward[(count * per_run,)](
            grad, added, m, inner, gates, scales, *contiguous(weight),
            dx, dbranch, part, width, run, block, per_run, dy_stride, dsum_stride, x_stride,
            branch_stride, gate_stride, scale_stride, float(eps), RMS=rms, **_row(width),
        )  # fmt: skip
        part = part.sum(1) if per_run > 1 else part[:, 0]
    else:
        count = _runs(max(rows, 1), gate, scale)[0]
        part = x.new_zeros(count, 3, width, dtype=torch.float32)
    products, grads, gate_sums = part.unbind(1)

    def like(value: Tensor, p: Tensor | None) -> Tensor:
        return x.new_empty(0) if p is None else value.to(p.dtype).reshape(p.shape)

    by_scale = 1.0 if scale is None else 1.0 + scale.reshape(-1, width).float()
    affine = products if weight is None else products * weight.float()
    dscale = like(affine if bias is None else affine + grads * bias.float(), scale)
    dweight = like((products * by_scale).sum(0), weight)
    dbias = like((grads * by_scale).sum(0), bias)
    results = dx, dbranch, like(gate_sums, gate), dscale, like(grads, scale), dweight, dbias
    return tuple(t.contiguous() for t in results)


def gated_residual(residual, x, gate) -> Tensor:
    y = contiguous_like(x)
    if y.numel():
        a, b, g = as_rows(residual), as_rows(x), as_rows(gate)
        rows, width = b.shape
        _residual[(rows,)](a, b, g, y, width, _runs(rows, gate)[1], a.stride(0), b.stride(0),
                           g.stride(0), BLOCK=min(triton.next_power_of_2(width), 2048))  # fmt: skip
    return y


def gated_residual_backward(dy, x, gate) -> tuple[Tensor, Tensor]:
    dx = contiguous_like(x)
    if not x.numel():
        return dx, torch.zeros_like(gate, memory_format=torch.contiguous_format)
    d, b, g = as_rows(dy), as_rows(x), as_rows(gate)
    rows, width = b.shape
    count, run = _runs(rows, gate)
    block, per_run = _blocks(count, run)
    part = x.new_empty(count, per_run, width, dtype=torch.float32)
    _residual_backward[(count * per_run,)](
        d, b, g, dx, part, width, run, block, per_run, d.stride(0), b.stride(0), g.stride(0),
        BLOCK=min(triton.next_power_of_2(width), 2048),
    )  # fmt: skip
    return dx, part.sum(1).to(gate.dtype).reshape(gate.shape)

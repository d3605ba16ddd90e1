"""y = clip(gain * act(x + bias), -clamp, clamp), its backward and double backward.

In backward each tile leaves its sums for the bias, and the partial sums are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, curvature, slope
from .bias_tiles import Tiling, load_bias, store_sums, tile
from .math import fp32
from .memory_order import dense, in_order_of
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
#: (4 KB are 64 of an SM's 164 with all 16 blocks that its threads allow)
BUDGET = {"_forward": (72, 2048), "_backward": (96, 4096), "_double_backward": (128, 4096)}


@triton.jit
def _forward(
    x_ptr, bias_ptr, y_ptr, rows, cols, channels, alpha, gain, limit,
    ACT: tl.constexpr, PER_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, cols, ROWS, COLS)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    y = activate(x, alpha, ACT) * gain
    y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))  # keeps NaN
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy_ptr, saved_ptr, bias_ptr, dx_ptr, dbias_ptr, rows, cols, channels, alpha, gain, limit,
    ACT: tl.constexpr, FROM_OUTPUT: tl.constexpr, PER_COLUMN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, cols, ROWS, COLS)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(saved_ptr + at, mask, 0.0).to(tl.float32)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    if FROM_OUTPUT:
        # Clamped outputs hold the limit as their dtype rounds it.
        limit = limit.to(saved_ptr.dtype.element_ty).to(tl.float32)
        clamped = tl.abs(x) >= limit
    else:
        if bias_ptr is not None:
            x += load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN)
        clamped = tl.abs(activate(x, alpha, ACT) * gain) > limit
    # one choice for clamp and mask: with two, ptxas spills for sm_80
    dx = tl.where(clamped | ~mask, 0.0, dy * slope(x, alpha, ACT) * gain)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
    if bias_ptr is not None:
        store_sums(dbias_ptr, dx, rows, cols, ROWS, COLS, PER_COLUMN)


@triton.jit
def _double_backward(
    gg_ptr, dy_ptr, x_ptr, bias_ptr, grad_dy_ptr, grad_x_ptr, dbias_ptr, rows, cols, channels,
    alpha, gain, limit, ACT: tl.constexpr, PER_COLUMN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, cols, ROWS, COLS)
    gg = tl.load(gg_ptr + at, mask, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    gg = tl.where(tl.abs(activate(x, alpha, ACT) * gain) > limit, 0.0, gg * gain)
    grad_dy = gg * slope(x, alpha, ACT)
    # stored before grad_x is begun: triton 3.6 would spill
    tl.store(grad_dy_ptr + at, grad_dy.to(grad_dy_ptr.dtype.element_ty), mask)
    grad_x = gg * dy * curvature(x, alpha, ACT)
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    if bias_ptr is not None:
        v = tl.where(mask, grad_x, 0.0)
        store_sums(dbias_ptr, v, rows, cols, ROWS, COLS, PER_COLUMN)


# ---- launchers ------------------------------------------------------------------------------


def _limit(clamp: float | None) -> float:
    return float("inf") if clamp is None else float(clamp)


def bias_act(x, bias, act, dim=1, gain=1.0, clamp=None, alpha=0.2) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        t = Tiling(x, bias, dim)
        _forward[t.grid](x, *contiguous(bias), y, *t.matrix, float(alpha), float(gain),
                         _limit(clamp), ACT=act, **t.tile)  # fmt: skip
    return y


def bias_act_backward(
    dy, saved, bias, act, dim, gain, clamp, alpha, from_output
) -> tuple[Tensor, Tensor]:
    saved = dense(saved)
    dy = in_order_of(dy, saved)
    dx = torch.empty_like(saved)
    if not saved.numel():
        return dx, dx.new_zeros(0 if bias is None else bias.numel())
    t = Tiling(saved, bias, dim)
    partial = t.partial_sums(saved, bias)
    _backward[t.grid](
        dy, saved, *contiguous(bias), dx, partial, *t.matrix, float(alpha), float(gain),
        _limit(clamp), ACT=act, FROM_OUTPUT=from_output, **t.tile,
    )  # fmt: skip
    return dx, t.bias_grad(partial, saved, bias)


def bias_act_double_backward(
    gg, dy, x, bias, act, dim, gain, clamp, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    gg, dy = in_order_of(gg, x), in_order_of(dy, x)
    grad_dy, grad_x = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return grad_dy, grad_x, x.new_zeros(0 if bias is None else bias.numel())
    t = Tiling(x, bias, dim)
    partial = t.partial_sums(x, bias)
    _double_backward[t.grid](gg, dy, x, *contiguous(bias), grad_dy, grad_x, partial, *t.matrix,
                             float(alpha), float(gain), _limit(clamp), ACT=act,
                             **t.tile)  # fmt: skip
    return grad_dy, grad_x, t.bias_grad(partial, x, bias)

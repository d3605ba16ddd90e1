"""y = x + sin(alpha x)^2 / (beta + eps) with alpha and beta per channel, backward and its backward.

In backward each tile leaves its sums for alpha and beta, and the partial sums are added in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_tiles import Tiling, load_bias, store_sums, tile
from .math import sines
from .memory_order import dense, in_order_of

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (96, 2048), "_backward": (120, 4096), "_double_backward": (168, 4096)}


@triton.jit
def _inverse(beta):
    return 1.0 / (beta + 1e-9)


@triton.jit
def _forward(
    x_ptr, alpha_ptr, beta_ptr, y_ptr, rows, cols, channels, PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, cols, ROWS, COLS)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    alpha = load_bias(alpha_ptr, row, col, rows, cols, channels, PER_COLUMN)
    b = _inverse(load_bias(beta_ptr, row, col, rows, cols, channels, PER_COLUMN))
    squared, _, _ = sines(alpha * x)
    tl.store(y_ptr + at, (x + squared * b).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy_ptr, x_ptr, alpha_ptr, beta_ptr, dx_ptr, dalpha_ptr, dbeta_ptr, rows, cols, channels,
    PER_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, cols, ROWS, COLS)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    alpha = load_bias(alpha_ptr, row, col, rows, cols, channels, PER_COLUMN)
    beta = load_bias(beta_ptr, row, col, rows, cols, channels, PER_COLUMN) + 1e-9
    squared, sin_twice, _ = sines(alpha * x)
    # Divided, not multiplied by a rounded 1 / beta, whose error all terms of a sum would share.
    scaled = tl.div_rn(dy, beta)
    dx = dy + alpha * scaled * sin_twice
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
    dalpha, dbeta = scaled * x * sin_twice, -tl.div_rn(scaled, beta) * squared
    store_sums(dalpha_ptr, dalpha, rows, cols, ROWS, COLS, PER_COLUMN)
    store_sums(dbeta_ptr, dbeta, rows, cols, ROWS, COLS, PER_COLUMN)


@triton.jit
def _double_backward(
    gg_ptr, gg_alpha_ptr, gg_beta_ptr, dy_ptr, x_ptr, alpha_ptr, beta_ptr, grad_dy_ptr, grad_x_ptr,
    dalpha_ptr, dbeta_ptr, rows, cols, channels, PER_COLUMN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = tile(rows, cols, ROWS, COLS)
    w = tl.load(gg_ptr + at, mask, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    alpha = load_bias(alpha_ptr, row, col, rows, cols, channels, PER_COLUMN)
    b = _inverse(load_bias(beta_ptr, row, col, rows, cols, channels, PER_COLUMN))
    p = load_bias(gg_alpha_ptr, row, col, rows, cols, channels, PER_COLUMN) * b
    q = load_bias(gg_beta_ptr, row, col, rows, cols, channels, PER_COLUMN) * b * b
    squared, sin_twice, cos_twice = sines(alpha * x)
    slope = sin_twice + 2.0 * alpha * x * cos_twice
    grad_dy = w * (1.0 + alpha * b * sin_twice) + p * x * sin_twice - q * squared
    tl.store(grad_dy_ptr + at, grad_dy.to(grad_dy_ptr.dtype.element_ty), mask)
    grad_x = 2.0 * alpha * alpha * b * w * cos_twice + p * slope - q * alpha * sin_twice
    tl.store(grad_x_ptr + at, (dy * grad_x).to(grad_x_ptr.dtype.element_ty), mask)
    dalpha = dy * (w * b * slope + 2.0 * p * x * x * cos_twice - q * x * sin_twice)
    dbeta = dy * b * (2.0 * q * squared - (w * alpha * b + p * x) * sin_twice)
    store_sums(dalpha_ptr, dalpha, rows, cols, ROWS, COLS, PER_COLUMN)
    store_sums(dbeta_ptr, dbeta, rows, cols, ROWS, COLS, PER_COLUMN)


# ---- launchers ------------------------------------------------------------------------------


def snake(x, alpha, beta) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        t = Tiling(x, alpha, 1)
        _forward[t.grid](x, alpha.contiguous(), beta.contiguous(), y, *t.matrix, **t.tile)
    return y


def _with_sums(kernel, before, x, alpha, beta, outputs) -> tuple[Tensor, ...]:
    """Runs the kernel; returns the outputs and the sums for alpha and beta."""
    if not x.numel():
        return *outputs, torch.zeros_like(alpha), torch.zeros_like(beta)
    t = Tiling(x, alpha, 1)
    sums = t.partial_sums(x, alpha), t.partial_sums(x, alpha)
    kernel[t.grid](
        *before, x, alpha.contiguous(), beta.contiguous(), *outputs, *sums, *t.matrix, **t.tile
    )  # fmt: skip
    return *outputs, *(t.bias_grad(s, x, alpha) for s in sums)


def snake_backward(dy, x, alpha, beta) -> tuple[Tensor, ...]:
    x = dense(x)
    before = (in_order_of(dy, x),)
    return _with_sums(_backward, before, x, alpha, beta, (torch.empty_like(x),))


def snake_double_backward(gg, gg_alpha, gg_beta, dy, x, alpha, beta) -> tuple[Tensor, ...]:
    x = dense(x)
    before = (
        in_order_of(gg, x), gg_alpha.contiguous(), gg_beta.contiguous(), in_order_of(dy, x)
    )  # fmt: skip
    outputs = torch.empty_like(x), torch.empty_like(x)
    return _with_sums(_double_backward, before, x, alpha, beta, outputs)

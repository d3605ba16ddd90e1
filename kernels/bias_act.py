"""y = clip(gain * act(x + bias), -clamp, clamp), its backward and double backward.

A dense tensor is a matrix in memory order: rows that share one bias value (bias runs along an
outer dimension), or rows with one value per column (PER_COLUMN: it runs along the innermost).
One program takes a tile of ROWS x COLS; in backward it also leaves the tile's bias gradient, and
the partial sums are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import expm1, fp32, softplus, tanh

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (72, 2048), "_backward": (96, 2048), "_double_backward": (128, 2048)}

_TILE = 1024


@triton.jit
def _act(x, alpha, ACT: tl.constexpr):
    if ACT == 1:
        return tl.where(x < 0, 0.0, x)
    elif ACT == 2:
        return tl.where(x < 0, x * alpha, x)
    elif ACT == 3:
        return tanh(x)
    elif ACT == 4:
        return tl.sigmoid(x)
    elif ACT == 5:
        return tl.where(x < 0, alpha * expm1(x), x)
    elif ACT == 6:
        return 1.0507009873554805 * tl.where(x < 0, 1.6732632423543772 * expm1(x), x)
    elif ACT == 7:
        return softplus(x)
    elif ACT == 8:
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def _slope(x, alpha, ACT: tl.constexpr):
    if ACT == 1:
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == 2:
        return tl.where(x > 0, 1.0, alpha)
    elif ACT == 3:
        # 4 e / (1 + e)^2: 1 - y * y cancels where tanh saturates.
        e = tl.exp(-2.0 * tl.abs(x))
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif ACT == 4:
        return tl.sigmoid(x) * tl.sigmoid(-x)
    elif ACT == 5:
        return tl.where(x > 0, 1.0, alpha * tl.exp(tl.minimum(x, 0.0)))
    elif ACT == 6:
        e = 1.6732632423543772 * tl.exp(tl.minimum(x, 0.0))
        return 1.0507009873554805 * tl.where(x > 0, 1.0, e)
    elif ACT == 7:
        return tl.sigmoid(x)
    elif ACT == 8:
        return tl.sigmoid(x) * (1.0 + x * tl.sigmoid(-x))
    else:
        return tl.where(x == x, 1.0, 1.0)


@triton.jit
def _curvature(x, alpha, ACT: tl.constexpr):
    if ACT == 3:
        return -2.0 * tanh(x) * _slope(x, alpha, ACT)
    elif ACT == 4:
        return tl.sigmoid(x) * tl.sigmoid(-x) * (1.0 - 2.0 * tl.sigmoid(x))
    elif ACT == 5:
        return tl.where(x > 0, 0.0, alpha * tl.exp(tl.minimum(x, 0.0)))
    elif ACT == 6:
        e = 1.7580993408473766 * tl.exp(tl.minimum(x, 0.0))
        return tl.where(x > 0, 0.0, e)
    elif ACT == 7:
        return tl.sigmoid(x) * tl.sigmoid(-x)
    elif ACT == 8:
        s, rest = tl.sigmoid(x), tl.sigmoid(-x)
        return s * rest * (2.0 + x * (rest - s))
    else:
        return x * 0.0


@triton.jit
def _tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets, mask, row and column numbers of this program's tile."""
    across = tl.cdiv(cols, COLS)
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // across * ROWS + tl.arange(0, ROWS))[:, None]
    col = (pid % across * COLS + tl.arange(0, COLS))[None, :]
    return row * cols + col, (row < rows) & (col < cols), row, col


@triton.jit
def _load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN: tl.constexpr):
    if PER_COLUMN:
        return tl.load(bias_ptr + col, col < cols, 0.0).to(tl.float32)
    else:
        return tl.load(bias_ptr + row % channels, row < rows, 0.0).to(tl.float32)


@triton.jit
def _store_bias_grad(ptr, v, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, PER_COLUMN: tl.constexpr):  # fmt: skip  # noqa: E501
    """The tile's sums: ptr is (row tiles, cols) for PER_COLUMN, else (rows, column tiles)."""
    across = tl.cdiv(cols, COLS)
    pid = tl.program_id(0).to(tl.int64)
    if PER_COLUMN:
        col = pid % across * COLS + tl.arange(0, COLS)
        tl.store(ptr + pid // across * cols + col, tl.sum(v, 0), col < cols)
    else:
        row = pid // across * ROWS + tl.arange(0, ROWS)
        tl.store(ptr + row * across + pid % across, tl.sum(v, 1), row < rows)


@triton.jit
def _forward(
    x_ptr, bias_ptr, y_ptr, rows, cols, channels, alpha, gain, limit,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = _tile(rows, cols, ROWS, COLS)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        x += _load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    y = _act(x, alpha, ACT) * gain
    y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))  # keeps NaN
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    dy_ptr, saved_ptr, bias_ptr, dx_ptr, dbias_ptr, rows, cols, channels, alpha, gain, limit,
    ACT: tl.constexpr, FROM_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PER_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = _tile(rows, cols, ROWS, COLS)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(saved_ptr + at, mask, 0.0).to(tl.float32)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    if FROM_OUTPUT:
        # Clamped outputs hold the limit as their dtype rounds it.
        limit = limit.to(saved_ptr.dtype.element_ty).to(tl.float32)
        clamped = tl.abs(x) >= limit
    else:
        if HAS_BIAS:
            x += _load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN)
        clamped = tl.abs(_act(x, alpha, ACT) * gain) > limit
    dx = tl.where(clamped, 0.0, dy * _slope(x, alpha, ACT) * gain)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
    if HAS_BIAS:
        _store_bias_grad(dbias_ptr, tl.where(mask, dx, 0.0), rows, cols, ROWS, COLS, PER_COLUMN)


@triton.jit
def _double_backward(
    gg_ptr, dy_ptr, x_ptr, bias_ptr, grad_dy_ptr, grad_x_ptr, dbias_ptr, rows, cols, channels,
    alpha, gain, limit, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, col = _tile(rows, cols, ROWS, COLS)
    gg = tl.load(gg_ptr + at, mask, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        x += _load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    gg = tl.where(tl.abs(_act(x, alpha, ACT) * gain) > limit, 0.0, gg * gain)
    grad_dy = gg * _slope(x, alpha, ACT)
    grad_x = gg * dy * _curvature(x, alpha, ACT)
    tl.store(grad_dy_ptr + at, grad_dy.to(grad_dy_ptr.dtype.element_ty), mask)
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    if HAS_BIAS:
        v = tl.where(mask, grad_x, 0.0)
        _store_bias_grad(dbias_ptr, v, rows, cols, ROWS, COLS, PER_COLUMN)


# ---- launchers ------------------------------------------------------------------------------


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


class _Tiling:
    """How a dense tensor is cut into tiles, and where the partial bias gradients go."""

    def __init__(self, x: Tensor, bias: Tensor | None, dim: int) -> None:
        size = x.numel()
        self.channels = 1 if bias is None else x.shape[dim]
        inner = size if self.channels <= 1 else x.stride(dim)
        if bias is None:  # any shape will do: long rows
            inner = _TILE if size % _TILE == 0 else size
        self.per_column = self.channels > 1 and inner == 1
        self.cols = self.channels if self.per_column else max(inner, 1)
        self.rows = size // max(self.cols, 1)
        self.COLS = min(triton.next_power_of_2(self.cols), _TILE)
        self.ROWS = max(_TILE // self.COLS, 1)
        self.down = triton.cdiv(self.rows, self.ROWS)
        self.across = triton.cdiv(self.cols, self.COLS)
        self.grid = (self.down * self.across,)

    def options(self, bias: Tensor | None) -> dict:
        return {"HAS_BIAS": bias is not None, "PER_COLUMN": self.per_column,
                "ROWS": self.ROWS, "COLS": self.COLS}  # fmt: skip

    def partial_sums(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return x.new_empty(0, dtype=torch.float32)
        shape = (self.down, self.cols) if self.per_column else (self.rows, self.across)
        return x.new_empty(shape, dtype=torch.float32)

    def bias_grad(self, partial: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return x.new_empty(0)
        if self.per_column:
            return partial.sum(0, dtype=torch.float64).to(x.dtype)
        of_channels = partial.view(-1, self.channels, self.across)
        return of_channels.sum((0, 2), dtype=torch.float64).to(x.dtype)


def _limit(clamp: float | None) -> float:
    return float("inf") if clamp is None else float(clamp)


def bias_act(x, bias, act, gain=1.0, dim=1, clamp=None, alpha=0.2) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        t = _Tiling(x, bias, dim)
        b = None if bias is None else bias.contiguous()
        _forward[t.grid](x, b, y, t.rows, t.cols, t.channels, float(alpha), float(gain),
                         _limit(clamp), ACT=act, **t.options(bias))  # fmt: skip
    return y


def bias_act_backward(
    dy, saved, bias, act, gain, dim, clamp, alpha, from_output
) -> tuple[Tensor, Tensor]:
    saved = dense(saved)
    dy = in_order_of(dy, saved)
    dx = torch.empty_like(saved)
    if not saved.numel():
        return dx, dx.new_zeros(0 if bias is None else bias.numel())
    t = _Tiling(saved, bias, dim)
    b = None if bias is None else bias.contiguous()
    partial = t.partial_sums(saved, bias)
    _backward[t.grid](dy, saved, b, dx, partial, t.rows, t.cols, t.channels, float(alpha),
                      float(gain), _limit(clamp), ACT=act, FROM_OUTPUT=from_output,
                      **t.options(bias))  # fmt: skip
    return dx, t.bias_grad(partial, saved, bias)


def bias_act_double_backward(
    gg, dy, x, bias, act, gain, dim, clamp, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    gg, dy = in_order_of(gg, x), in_order_of(dy, x)
    grad_dy, grad_x = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return grad_dy, grad_x, x.new_zeros(0 if bias is None else bias.numel())
    t = _Tiling(x, bias, dim)
    b = None if bias is None else bias.contiguous()
    partial = t.partial_sums(x, bias)
    _double_backward[t.grid](gg, dy, x, b, grad_dy, grad_x, partial, t.rows, t.cols, t.channels,
                             float(alpha), float(gain), _limit(clamp), ACT=act,
                             **t.options(bias))  # fmt: skip
    return grad_dy, grad_x, t.bias_grad(partial, x, bias)

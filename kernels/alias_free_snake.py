"""Up by 2 with a filter of 12 taps, snake, down by 2 with another, and the backward of it.

A program takes BLOCK samples of a row, of which those near its ends only serve their neighbours.
The upsampled signal is its even and odd samples (csrc/cpu/alias_free_filters.h has the formulas):
the first filter reads x around each sample through the cache, the second what the other threads
hold, through shared memory (tl.gather).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import sines

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (80, 2048), "_backward": (104, 2048)}

_BLOCK = 512
#: samples at a block's start and end that are not its own
_BEFORE, _AFTER = tl.constexpr(3), tl.constexpr(6)


@triton.jit
def _split(ptr, taps_ptr, s, time, HOLD: tl.constexpr):
    """Even and odd samples at s of the upsampled row; beyond its ends zeros, or its last value."""
    even = tl.zeros(s.shape, tl.float32)
    odd = tl.zeros(s.shape, tl.float32)
    for k in tl.static_range(7):
        # From the far taps, which are the small ones, to the near: so the sums round least.
        d = (3 - k // 2) * (1 - k % 2 * 2)
        at = s + d
        inside = (at >= 0) & (at < time)
        if HOLD:
            v = tl.load(ptr + tl.minimum(tl.maximum(at, 0), time - 1)).to(tl.float32)
        else:
            v = tl.load(ptr + at, inside, 0.0).to(tl.float32)
        if k != 0:  # d = 3
            even += v * tl.load(taps_ptr + (5 - 2 * d)).to(tl.float32)
        if k != 1:  # d = -3
            odd += v * tl.load(taps_ptr + (6 - 2 * d)).to(tl.float32)
    return even, odd


@triton.jit
def _merge(even, odd, taps_ptr, BLOCK: tl.constexpr):
    """The filtered row; right but for three samples at either end of the block."""
    j = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(7):
        d = (3 - k // 2) * (1 - k % 2 * 2)
        at = tl.minimum(tl.maximum(j + d, 0), BLOCK - 1)
        if k != 1:
            total += tl.gather(even, at, 0) * tl.load(taps_ptr + (2 * d + 5)).to(tl.float32)
        if k != 0:
            total += tl.gather(odd, at, 0) * tl.load(taps_ptr + (2 * d + 6)).to(tl.float32)
    return total


@triton.jit
def _samples(time, BLOCK: tl.constexpr):
    """This program's row, its samples, and which of them are its own."""
    own = BLOCK - _BEFORE - _AFTER
    tiles = tl.cdiv(time, own)
    pid = tl.program_id(0).to(tl.int64)
    first = (pid % tiles * own).to(tl.int32)
    s = first - _BEFORE + tl.arange(0, BLOCK)
    return pid // tiles, s, (s >= first) & (s < first + own) & (s < time)


@triton.jit
def _forward(
    x_ptr, alpha_ptr, beta_ptr, up_ptr, down_ptr, y_ptr, channels, time, BLOCK: tl.constexpr
):
    row, s, own = _samples(time, BLOCK)
    alpha = tl.load(alpha_ptr + row % channels).to(tl.float32)
    b = 1.0 / (tl.load(beta_ptr + row % channels).to(tl.float32) + 1e-9)
    held = tl.minimum(tl.maximum(s, 0), time - 1)
    even, odd = _split(x_ptr + row * time, up_ptr, held, time, True)
    even, odd = 2.0 * even, 2.0 * odd
    even_squared, _, _ = sines(alpha * even)
    odd_squared, _, _ = sines(alpha * odd)
    even += even_squared * b
    odd += odd_squared * b
    # Beyond the ends the first even and the last odd sample go on.
    before, beyond = s < 0, s >= time
    y = _merge(tl.where(beyond, odd, even), tl.where(before, even, odd), down_ptr, BLOCK)
    tl.store(y_ptr + row * time + s, y.to(y_ptr.dtype.element_ty), own)


@triton.jit
def _through_snake(d, z, alpha, b):
    """The gradient of snake's argument, and the terms of those of alpha and beta but for b."""
    squared, sin_twice, _ = sines(alpha * z)
    return d * (1.0 + alpha * b * sin_twice), d * z * sin_twice, d * squared


@triton.jit
def _backward(
    dy_ptr, x_ptr, alpha_ptr, beta_ptr, up_ptr, down_ptr, dx_ptr, dalpha_ptr, dbeta_ptr, channels,
    time, BLOCK: tl.constexpr,
):  # fmt: skip
    row, s, own = _samples(time, BLOCK)
    alpha = tl.load(alpha_ptr + row % channels).to(tl.float32)
    # In fp64 where sums are multiplied by it: all their terms would share its rounding error.
    b = 1.0 / (tl.load(beta_ptr + row % channels).to(tl.float64) + 1e-9)
    d_even, d_odd = _split(dy_ptr + row * time, down_ptr, s, time, False)
    # What reached the samples beyond an end goes to the sample there.
    before, beyond = s < 0, s >= time
    both = d_even + d_odd
    d_even += tl.where(s == 0, tl.sum(tl.where(before, both, 0.0)), 0.0)
    d_odd += tl.where(s == time - 1, tl.sum(tl.where(beyond, both, 0.0)), 0.0)
    outside = before | beyond
    d_even, d_odd = tl.where(outside, 0.0, d_even), tl.where(outside, 0.0, d_odd)
    even, odd = _split(x_ptr + row * time, up_ptr, s, time, True)
    b32 = b.to(tl.float32)
    d_even, even_alpha, even_beta = _through_snake(d_even, 2.0 * even, alpha, b32)
    d_odd, odd_alpha, odd_beta = _through_snake(d_odd, 2.0 * odd, alpha, b32)
    dalpha = tl.sum(tl.where(own, even_alpha + odd_alpha, 0.0)).to(tl.float64) * b
    dbeta = tl.sum(tl.where(own, even_beta + odd_beta, 0.0)).to(tl.float64) * b * b
    dx = 2.0 * _merge(d_even, d_odd, up_ptr, BLOCK)
    folded = tl.where(s == 0, tl.sum(tl.where(before, dx, 0.0)), 0.0)
    folded += tl.where(s == time - 1, tl.sum(tl.where(beyond, dx, 0.0)), 0.0)
    tl.store(dx_ptr + row * time + s, (dx + folded).to(dx_ptr.dtype.element_ty), own)
    tl.store(dalpha_ptr + tl.program_id(0), dalpha)
    tl.store(dbeta_ptr + tl.program_id(0), -dbeta)


def _tiles(x: Tensor) -> int:
    return triton.cdiv(x.shape[2], _BLOCK - _BEFORE.value - _AFTER.value)


def alias_free_snake(x, alpha, beta, up, down) -> Tensor:
    rows = x.contiguous()
    y = torch.empty_like(rows)
    if x.numel():
        _forward[(x.shape[0] * x.shape[1] * _tiles(x),)](
            rows, alpha.contiguous(), beta.contiguous(), up.contiguous(), down.contiguous(), y,
            x.shape[1], x.shape[2], BLOCK=_BLOCK,
        )  # fmt: skip
    innermost = not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    return y.transpose(1, 2).contiguous().transpose(1, 2) if innermost else y


def alias_free_snake_backward(dy, x, alpha, beta, up, down) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(alpha), torch.zeros_like(beta)
    n, channels, time = x.shape
    sums = x.new_empty((2, n, channels, _tiles(x)), dtype=torch.float64)
    _backward[(sums[0].numel(),)](
        dy, x, alpha.contiguous(), beta.contiguous(), up.contiguous(), down.contiguous(), dx,
        sums[0], sums[1], channels, time, BLOCK=_BLOCK,
    )  # fmt: skip
    dalpha, dbeta = sums.sum((1, 3)).to(x.dtype)
    return dx, dalpha, dbeta

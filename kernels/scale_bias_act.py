"""y = clip(gain * act(x * scale + noise * strength + bias), -clamp, clamp), its backward and double
backward; act is linear, relu or lrelu, which is lrelu with its alpha.

A program takes tiles of channels and positions (channel_tiles.py): in forward one, in the
derivatives a piece of the positions, whose sums for scale, strength and bias it leaves in fp64.
These few are added in a fixed order. The gradient of strength may be one number for millions of
terms of either sign.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import Layout, ordered, tile
from .math import fp32
from .memory_order import in_order_of
from .optional import contiguous, value_or

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (96, 1024), "_backward": (184, 1024), "_double_backward": (176, 1024)}


@triton.jit
def _before_act(x, scale, bias, noise_ptr, strength_ptr, noise_at, position, positions):
    """z, and the noise in it."""
    noise = value_or(noise_ptr, noise_at + position, position < positions, 0.0)
    if strength_ptr is not None:
        return x * scale + (noise * tl.load(strength_ptr).to(tl.float32) + bias), noise
    else:
        return x * scale + (noise + bias), noise


@triton.jit
def _act(z, alpha, gain):
    return tl.where(z < 0, tl.where(alpha == 0, 0.0, z * alpha), z) * gain  # relu of -inf is 0


@triton.jit
def _slope(z, alpha, gain, limit):
    """dy/dz / gain. Sums are multiplied by the gain at their end, in fp64: so their terms are
    rounded once less, where z > 0."""
    d = tl.where(z > 0, 1.0, alpha)
    return tl.where(tl.abs(_act(z, alpha, gain)) > limit, 0.0, d)


@triton.jit
def _forward(
    x_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, y_ptr, channels, positions, pieces,
    c_stride, p_stride, noise_stride, alpha, gain, limit,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, piece = tile(channels, pieces, BLOCK_C)
    position = piece * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    known = channel < channels
    mask = known & (position < positions)
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    scale = value_or(scale_ptr, sample * channels + channel, known, 1.0)
    bias = value_or(bias_ptr, channel, known, 0.0)
    at = sample * channels * positions + channel * c_stride + position * p_stride
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    noise_at = sample * noise_stride
    z, _ = _before_act(x, scale, bias, noise_ptr, strength_ptr, noise_at, position, positions)
    y = _act(z, alpha, gain)
    y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))  # keeps NaN
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _piece(
    scale_ptr, bias_ptr, channels, positions, pieces, piece_size, BLOCK_C: tl.constexpr
):  # fmt: skip
    """A program's sample, channels, their mask, scale and bias, where its piece of the positions
    begins and ends, and where its sums go."""
    sample, channel, piece = tile(channels, pieces, BLOCK_C)
    known = channel < channels
    row = sample * channels + channel
    scale, bias = value_or(scale_ptr, row, known, 1.0), value_or(bias_ptr, channel, known, 0.0)
    first = piece * piece_size
    last = tl.minimum(first + piece_size, positions)
    return sample, channel, known, scale, bias, first, last, row * pieces + piece


@triton.jit
def _terms(
    dy_ptr, x_ptr, noise_ptr, strength_ptr, at, mask, scale, bias, noise_at, position, positions,
    alpha, gain, limit,
):  # fmt: skip
    """x, its noise, dy/dz / gain, and dy times that."""
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    z, noise = _before_act(x, scale, bias, noise_ptr, strength_ptr, noise_at, position, positions)
    slope = _slope(z, alpha, gain, limit)
    return x, noise, slope, tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * slope


@triton.jit
def _store_sum(ptr, lanes, mask):
    tl.store(ptr, tl.sum(lanes.to(tl.float64), 1)[:, None], mask)


@triton.jit
def _backward(
    dy_ptr, x_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, dx_ptr, part_ptr, channels,
    positions, pieces, piece_size, c_stride, p_stride, noise_stride, alpha, gain, limit,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, known, scale, bias, first, last, part = _piece(
        scale_ptr, bias_ptr, channels, positions, pieces, piece_size, BLOCK_C
    )
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    scales = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    noises = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    biases = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[None, :]
        mask = known & (position < last)
        at = sample * channels * positions + channel * c_stride + position * p_stride
        x, noise, _, g = _terms(
            dy_ptr, x_ptr, noise_ptr, strength_ptr, at, mask, scale, bias, sample * noise_stride,
            position, positions, alpha, gain, limit,
        )  # fmt: skip
        tl.store(dx_ptr + at, (g * (scale * gain)).to(dx_ptr.dtype.element_ty), mask)
        if scale_ptr is not None:
            scales += g * x
        if strength_ptr is not None:
            noises += g * noise
        if bias_ptr is not None:
            biases += g
    _store_sum(part_ptr + part * 3, scales, known)
    _store_sum(part_ptr + part * 3 + 1, noises, known)
    _store_sum(part_ptr + part * 3 + 2, biases, known)


@triton.jit
def _double_backward(
    gg_x_ptr, gg_scale_ptr, gg_strength_ptr, gg_bias_ptr, dy_ptr, x_ptr, scale_ptr, noise_ptr,
    strength_ptr, bias_ptr, grad_dy_ptr, grad_x_ptr, part_ptr, channels, positions, pieces,
    piece_size, c_stride, p_stride, noise_stride, alpha, gain, limit,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, known, scale, bias, first, last, part = _piece(
        scale_ptr, bias_ptr, channels, positions, pieces, piece_size, BLOCK_C
    )
    alpha, gain, limit = fp32(alpha), fp32(gain), fp32(limit)
    gg_scale = value_or(gg_scale_ptr, sample * channels + channel, known, 0.0)
    gg_bias = value_or(gg_bias_ptr, channel, known, 0.0)
    scales = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[None, :]
        mask = known & (position < last)
        at = sample * channels * positions + channel * c_stride + position * p_stride
        x, noise, slope, g = _terms(
            dy_ptr, x_ptr, noise_ptr, strength_ptr, at, mask, scale, bias, sample * noise_stride,
            position, positions, alpha, gain, limit,
        )  # fmt: skip
        u = x * gg_scale + gg_bias
        if gg_strength_ptr is not None:
            u += noise * tl.load(gg_strength_ptr).to(tl.float32)
        if gg_x_ptr is not None:
            gg_x = tl.load(gg_x_ptr + at, mask, 0.0).to(tl.float32)
            u += gg_x * scale
            scales += g * gg_x
        tl.store(grad_dy_ptr + at, (slope * (u * gain)).to(grad_dy_ptr.dtype.element_ty), mask)
        tl.store(grad_x_ptr + at, (g * (gg_scale * gain)).to(grad_x_ptr.dtype.element_ty), mask)
    _store_sum(part_ptr + part, scales, known)


# ---- launchers ------------------------------------------------------------------------------


def _numbers(
    x: Tensor, noise: Tensor | None, alpha: float, gain: float, clamp: float | None
) -> tuple[int, float, float, float]:
    """noise_stride, alpha, gain, limit"""
    positions = x.shape[2:].numel()
    per_sample = noise is not None and noise.numel() == x.shape[0] * positions
    limit = float("inf") if clamp is None else float(clamp)
    return positions if per_sample else 0, float(alpha), float(gain), limit


def _like(sums: Tensor, parameter: Tensor | None) -> Tensor:
    """Sums of each sample's channel added up to the shape of the parameter, in its dtype."""
    if parameter is None:
        return sums.new_empty(0)
    total = sums.reshape(-1, parameter.numel()).sum(0) if parameter.numel() else sums.new_zeros(0)
    return total.to(parameter.dtype).reshape(parameter.shape)


def scale_bias_act(
    x, scale=None, noise=None, strength=None, bias=None, alpha=1.0, gain=1.0, clamp=None
) -> Tensor:
    x = ordered(x)
    y = torch.empty_like(x)
    if x.numel():
        t = Layout(x, 1)
        _forward[t.map_grid](
            x, *contiguous(scale, noise, strength, bias), y, t.channels, t.positions, t.tiles,
            *t.strides, *_numbers(x, noise, alpha, gain, clamp), **t.blocks,
        )  # fmt: skip
    return y


def scale_bias_act_backward(
    dy, x, scale, noise, strength, bias, alpha, gain, clamp
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = ordered(x)
    dx = torch.empty_like(x)
    t = Layout(x, 1) if x.numel() else None
    part = x.new_zeros(*x.shape[:2], t.pieces if t else 1, 3, dtype=torch.float64)
    if t:
        _backward[t.sums_grid](
            in_order_of(dy, x), x, *contiguous(scale, noise, strength, bias), dx, part, t.channels,
            t.positions, t.pieces, t.piece_size, *t.strides,
            *_numbers(x, noise, alpha, gain, clamp), **t.blocks,
        )  # fmt: skip
    sums = part.sum(2) * gain
    return dx, _like(sums[..., 0], scale), _like(sums[..., 1], strength), _like(sums[..., 2], bias)


def scale_bias_act_double_backward(
    gg_x, gg_scale, gg_strength, gg_bias, dy, x, scale, noise, strength, bias, alpha, gain, clamp
) -> tuple[Tensor, Tensor, Tensor]:
    x = ordered(x)
    grad_dy, grad_x = torch.empty_like(x), torch.empty_like(x)
    t = Layout(x, 1) if x.numel() else None
    part = x.new_zeros(*x.shape[:2], t.pieces if t else 1, dtype=torch.float64)
    if t:
        _double_backward[t.sums_grid](
            None if gg_x is None else in_order_of(gg_x, x),
            *contiguous(gg_scale, gg_strength, gg_bias), in_order_of(dy, x), x,
            *contiguous(scale, noise, strength, bias), grad_dy, grad_x, part, t.channels,
            t.positions, t.pieces, t.piece_size, *t.strides,
            *_numbers(x, noise, alpha, gain, clamp), **t.blocks,
        )  # fmt: skip
    return grad_dy, grad_x, _like(part.sum(2) * gain, scale)

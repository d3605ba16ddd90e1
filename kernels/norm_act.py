"""y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) for every norm of x, and backward.

Sums go over parts of each norm; a second kernel adds the parts in a fixed order and makes of them
the few numbers of a norm that the writing pass needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, slope
from .math import fp32
from .memory_order import in_order_of
from .norm_tiles import (
    BATCH,
    GIVEN,
    PIXEL,
    Tiling,
    affine,
    centred,
    gradient_of,
    in_layout,
    offsets,
    place,
    rstd_of,
    store_part,
    store_value,
    total,
)
from .optional import contiguous, value_or

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_statistics": (56, 1024), "_join": (64, 1024), "_forward": (56, 0),
    "_backward_sums": (72, 1024), "_backward_values": (40, 1024), "_backward": (64, 0),
}  # fmt: skip


# ---- forward --------------------------------------------------------------------------------


@triton.jit
def _statistics(
    x_ptr, mean_ptr, squares_ptr, samples, rows, channels, inner, count, part,
    MEAN: tl.constexpr, INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations from it of part of each norm; tiles joined by Chan's rule."""
    sample, channel, number = place(samples, channels, CHANNELS)
    first = number * part
    last = tl.minimum(first + part, count)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, last, ELEMENTS):
        element = start + tl.arange(0, ELEMENTS)
        at, mask = offsets(sample, element, last, channel, rows, channels, inner, INNERMOST)
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        if MEAN:
            n = tl.minimum(last - start, ELEMENTS).to(tl.float32)
            before = (start - first).to(tl.float32)
            tile_mean = tl.sum(x, 0) / n
            # What the mean's rounding left over goes to the mean.
            tile_mean += tl.sum(tl.where(mask, x - tile_mean[None, :], 0.0), 0) / n
            x = tl.where(mask, x - tile_mean[None, :], 0.0)
            delta = tile_mean - mean
            share = n / (before + n)
            squares += delta * delta * before * share
            mean += delta * share
        squares += tl.sum(x * x, 0)
    to = number * samples * channels + sample * channels + channel
    if MEAN:
        tl.store(mean_ptr + to, mean, channel < channels)
    tl.store(squares_ptr + to, squares, channel < channels)


@triton.jit
def _join(
    mean_parts, squares_parts, mean_ptr, var_ptr, rstd_ptr, count, norms, part, parts, eps,
    MEAN: tl.constexpr, PARTS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    norm = tl.program_id(0).to(tl.int64) * NORMS + tl.arange(0, NORMS)
    p = tl.arange(0, PARTS)[:, None]
    known = norm < norms
    mask = (p < parts) & known[None, :]
    at = p * norms + norm[None, :]
    squares = tl.load(squares_parts + at, mask, 0.0)
    if MEAN:
        n = tl.where(p < parts, tl.minimum(part, count - p * part), 0).to(tl.float32)
        means = tl.load(mean_parts + at, mask, 0.0)
        # About the first part's mean, so that a large one costs no digits.
        shift = tl.load(mean_parts + norm, known, 0.0)
        mean = shift + tl.sum(tl.where(mask, means - shift[None, :], 0.0) * n, 0) / count
        delta = tl.where(mask, means - mean[None, :], 0.0)
        squares += delta * delta * n
        tl.store(mean_ptr + norm, mean, known)
    var = tl.sum(squares, 0) / count
    tl.store(var_ptr + norm, var, known)
    tl.store(rstd_ptr + norm, 1.0 / tl.sqrt(var + fp32(eps)), known)


@triton.jit
def _forward(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, samples, rows, channels, inner, count,
    gain, alpha, ACT: tl.constexpr, INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, channel, number = place(samples, channels, CHANNELS)
    element = number * ELEMENTS + tl.arange(0, ELEMENTS)
    at, mask = offsets(sample, element, count, channel, rows, channels, inner, INNERMOST)
    norm, known = sample * channels + channel, channel < channels
    x = centred(x_ptr, at, mask, mean_ptr, norm, known)
    _, z = affine(x, rstd_ptr, weight_ptr, bias_ptr, norm, known)
    y = activate(z, fp32(alpha), ACT) * fp32(gain)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


# ---- backward -------------------------------------------------------------------------------


@triton.jit
def _backward_sums(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, samples, rows, channels,
    inner, count, part, parts, gain, alpha, ACT: tl.constexpr, INNERMOST: tl.constexpr,
    ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, channel, number = place(samples, channels, CHANNELS)
    norm, known = sample * channels + channel, channel < channels
    last = tl.minimum(number * part + part, count)
    gain, alpha = fp32(gain), fp32(alpha)
    g_sum = tl.zeros([ELEMENTS, CHANNELS], tl.float32)
    gx_sum = tl.zeros([ELEMENTS, CHANNELS], tl.float32)
    for start in range(number * part, last, ELEMENTS):
        element = start + tl.arange(0, ELEMENTS)
        at, mask = offsets(sample, element, last, channel, rows, channels, inner, INNERMOST)
        x = centred(x_ptr, at, mask, mean_ptr, norm, known)
        _, z = affine(x, rstd_ptr, weight_ptr, bias_ptr, norm, known)
        g = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * (slope(z, alpha, ACT) * gain)
        g_sum += g
        gx_sum += g * x
    norms = samples * channels
    store_part(sum_ptr, 0, g_sum, number, parts, norm, norms, known)
    store_part(sum_ptr, 1, gx_sum, number, parts, norm, norms, known)


@triton.jit
def _backward_values(
    sum_ptr, rstd_ptr, value_ptr, dweight_ptr, dbias_ptr, norms, parts, share, mean_share,
    PARTS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    norm = tl.program_id(0).to(tl.int64) * NORMS + tl.arange(0, NORMS)
    rstd = value_or(rstd_ptr, norm, norm < norms, 1.0)
    dbias = total(sum_ptr, 0, norm, norms, parts, PARTS)
    dweight = total(sum_ptr, 1, norm, norms, parts, PARTS) * rstd
    store_value(value_ptr, 0, fp32(mean_share) * dbias, norm, norms)
    store_value(value_ptr, 1, fp32(share) * dweight * rstd, norm, norms)
    store_value(dweight_ptr, 0, dweight, norm, norms)
    store_value(dbias_ptr, 0, dbias, norm, norms)


@triton.jit
def _backward(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, value_ptr, dx_ptr, samples, rows,
    channels, inner, count, gain, alpha, ACT: tl.constexpr, INNERMOST: tl.constexpr,
    ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, channel, number = place(samples, channels, CHANNELS)
    element = number * ELEMENTS + tl.arange(0, ELEMENTS)
    at, mask = offsets(sample, element, count, channel, rows, channels, inner, INNERMOST)
    norm, known = sample * channels + channel, channel < channels
    x = centred(x_ptr, at, mask, mean_ptr, norm, known)
    scale, z = affine(x, rstd_ptr, weight_ptr, bias_ptr, norm, known)
    s = slope(z, fp32(alpha), ACT) * fp32(gain)
    g = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * s
    g -= value_or(value_ptr, norm, known, 0.0)[None, :]
    g -= x * value_or(value_ptr + samples * channels, norm, known, 0.0)[None, :]
    tl.store(dx_ptr + at, (g * scale).to(dx_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


def _moments(x: Tensor, t: Tiling, has_mean: bool, eps: float) -> tuple:
    """(mean or None, var, 1 / sqrt(var + eps)) of the norms of an x that has elements."""
    var, rstd, squares = t.new(x), t.new(x), t.new(x, t.parts)
    mean, means = (t.new(x), t.new(x, t.parts)) if has_mean else (None, None)
    _statistics[t.sum_grid](x, means, squares, *t.view, t.part, MEAN=has_mean, **t.tile)
    _join[t.value_grid](means, squares, mean, var, rstd, t.count, t.norms, t.part, t.parts,
                        float(eps), MEAN=has_mean, **t.values)  # fmt: skip
    return mean, var, rstd


def channel_moments(x) -> tuple[Tensor, Tensor]:
    x = in_layout(x, BATCH)
    if not x.numel():
        return tuple(x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    mean, var, _ = _moments(x, Tiling(x, BATCH), True, 0.0)
    return mean, var


def norm_act(
    x, running_mean, running_var, weight, bias, statistics, eps, act, gain, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    x = in_layout(x, statistics)
    y = torch.empty_like(x)
    mean, var = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, mean, var
    t = Tiling(x, statistics)
    if statistics == GIVEN:
        centre, rstd = running_mean.contiguous(), rstd_of(running_var, eps)
    else:
        centre, var, rstd = _moments(x, t, statistics != PIXEL, eps)
        mean = mean if centre is None else centre
    _forward[t.grid](x, centre, rstd, *contiguous(weight, bias), y, *t.view, float(gain),
                     float(alpha), ACT=act, **t.tile)  # fmt: skip
    return y, mean, var


def norm_act_backward(
    dy, x, mean, var, weight, bias, statistics, eps, act, gain, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    x = in_layout(x, statistics)
    dy, dx = in_order_of(dy, x), torch.empty_like(x)
    dweight, dbias = gradient_of(weight), gradient_of(bias)
    if x.numel():
        t = Tiling(x, statistics)
        rstd = rstd_of(var, eps)
        mean, weight, bias = contiguous(mean, weight, bias)
        inputs = (dy, x, mean, rstd, weight, bias)
        options = {"ACT": act, **t.tile}
        sums, values = t.new_sums(x, 2), t.new(x, 2)
        _backward_sums[t.sum_grid](*inputs, sums, *t.view, t.part, t.parts, float(gain),
                                   float(alpha), **options)  # fmt: skip
        _backward_values[t.value_grid](sums, rstd, values, dweight, dbias, t.norms, t.parts,
                                       t.share, t.mean_share, **t.values)  # fmt: skip
        _backward[t.grid](*inputs, values, dx, *t.view, float(gain), float(alpha), **options)
    return dx, *(x.new_empty(0) if grad is None else grad for grad in (dweight, dbias))

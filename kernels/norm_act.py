"""y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) for every norm of x, and backward.

A norm is what shares a mean and a variance: a channel of the batch, a channel of a sample, or a
pixel. Seen in memory order as (samples, rows, channels, inner) a dense tensor has a norm for each
(sample, channel). A program takes a tile of ELEMENTS x CHANNELS: one norm where its elements are
neighbours, several where the channels are (INNERMOST). Sums go over parts of each norm; a second
kernel adds the parts in a fixed order and makes of them the few numbers of a norm that the writing
pass needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import _act, _slope, dense, in_order_of
from .channel_tiles import ordered
from .math import fp32

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_statistics": (56, 1024), "_join": (64, 1024), "_forward": (56, 0),
    "_backward_sums": (72, 1024), "_backward_values": (40, 1024), "_backward": (64, 0),
}  # fmt: skip

_TILE = 1024
_PROGRAMS = 1024  # of a sum: about eight for each SM of the largest GPUs
_GIVEN, _BATCH, _SAMPLE, _PIXEL = range(4)


# ---- tiles ----------------------------------------------------------------------------------


@triton.jit
def place(samples, channels, CHANNELS: tl.constexpr):
    """This program's sample, channels and number along a norm."""
    across = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0).to(tl.int64)
    unit = pid % (samples * across)
    channel = unit % across * CHANNELS + tl.arange(0, CHANNELS)
    return unit // across, channel, pid // (samples * across)


@triton.jit
def offsets(sample, element, last, channel, rows, channels, inner, INNERMOST: tl.constexpr):
    """Offsets and mask of a tile."""
    e, c = element[:, None], channel[None, :]
    if INNERMOST:
        at = (sample * rows + e) * channels + c
    else:
        at = ((sample * rows + e // inner) * channels + c) * inner + e % inner
    return at, (e < last) & (c < channels)


@triton.jit
def value(ptr, norm, known, MISSING: tl.constexpr):
    """A value for each of some norms."""
    if ptr is None:
        return tl.zeros_like(norm).to(tl.float32) + MISSING
    else:
        return tl.load(ptr + norm, known, 0.0).to(tl.float32)


@triton.jit
def centred(x_ptr, at, mask, mean_ptr, norm, known):
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    return x - value(mean_ptr, norm, known, 0.0)[None, :]


@triton.jit
def affine(x, rstd_ptr, weight_ptr, bias_ptr, norm, known):
    """(weight / deviation, that * x + bias)"""
    scale = value(rstd_ptr, norm, known, 1.0) * value(weight_ptr, norm, known, 1.0)
    return scale[None, :], x * scale[None, :] + value(bias_ptr, norm, known, 0.0)[None, :]


@triton.jit
def store_part(ptr, k, sums, part, parts, norm, norms, known):
    """A part of sum k, the tile's lanes joined in fp64: ptr is (sums, parts, norms)."""
    at = ptr + (k * parts + part) * norms + norm
    tl.store(at, tl.sum(sums.to(tl.float64), 0), known)


@triton.jit
def total(ptr, k, norm, norms, parts, PARTS: tl.constexpr):
    p = tl.arange(0, PARTS)[:, None]
    mask = (p < parts) & (norm < norms)[None, :]
    return tl.sum(tl.load(ptr + (k * parts + p) * norms + norm[None, :], mask, 0.0), 0)


@triton.jit
def store_value(ptr, k, v, norm, norms):
    if ptr is not None:
        tl.store(ptr + k * norms + norm, v.to(tl.float32).to(ptr.dtype.element_ty), norm < norms)


# ---- forward --------------------------------------------------------------------------------


@triton.jit
def _statistics(
    x_ptr, mean_ptr, squares_ptr, samples, rows, channels, inner, count, part, parts,
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
    y = _act(z, fp32(alpha), ACT) * fp32(gain)
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
        g = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * (_slope(z, alpha, ACT) * gain)
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
    rstd = value(rstd_ptr, norm, norm < norms, 1.0)
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
    s = _slope(z, fp32(alpha), ACT) * fp32(gain)
    g = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * s
    g -= value(value_ptr, norm, known, 0.0)[None, :]
    g -= x * value(value_ptr + samples * channels, norm, known, 0.0)[None, :]
    tl.store(dx_ptr + at, (g * scale).to(dx_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


def in_layout(x: Tensor, statistics: int) -> Tensor:
    return dense(x) if statistics <= _BATCH else ordered(x)


class Tiling:
    """How a dense tensor is cut into tiles, and its norms into parts; the shape alone decides."""

    def __init__(self, x: Tensor, statistics: int) -> None:
        samples, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
        innermost = positions == 1 or not x.is_contiguous()
        if statistics <= _BATCH:
            inner = x.stride(1) if channels > 1 else x.numel()
            view = (1, x.numel() // (channels * inner), channels, inner)
        elif statistics == _SAMPLE:
            view = (samples, positions, channels, 1) if innermost else (1, 1, samples * channels, positions)  # noqa: E501  # fmt: skip
        else:
            view = (1, 1, samples * positions, channels) if innermost else (samples, channels, positions, 1)  # noqa: E501  # fmt: skip
        samples, rows, channels, inner = view
        self.count, self.norms = rows * inner, samples * channels
        self.view = (*view, self.count)
        across = min(triton.next_power_of_2(channels), 64) if inner == 1 else 1
        down = min(triton.next_power_of_2(self.count), _TILE // across)
        self.tile = {"INNERMOST": inner == 1, "ELEMENTS": down, "CHANNELS": across}
        units, tiles = samples * triton.cdiv(channels, across), triton.cdiv(self.count, down)
        self.grid = (units * tiles,)
        most = max(1, min(_PROGRAMS // units, tiles))
        self.part = triton.cdiv(triton.cdiv(self.count, most), down) * down
        self.parts = triton.cdiv(self.count, self.part)
        self.sum_grid = (units * self.parts,)
        parts = triton.next_power_of_2(self.parts)
        own = max(1, min(triton.next_power_of_2(self.norms), 1024 // parts))
        self.values = {"PARTS": parts, "NORMS": own}
        self.value_grid = (triton.cdiv(self.norms, own),)
        self.share = 0.0 if statistics == _GIVEN else 1.0 / self.count
        self.mean_share = 0.0 if statistics == _PIXEL else self.share

    def new(self, x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(*shape, self.norms, dtype=torch.float32)

    def new_sums(self, x: Tensor, number: int) -> Tensor:
        return x.new_empty(number, self.parts, self.norms, dtype=torch.float64)


def row_of(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def rstd_of(var: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(var.float() + eps)


def gradient_of(parameter: Tensor | None) -> Tensor | None:
    """Zeros: an empty x has no tile that would write the sums."""
    return None if parameter is None else parameter.new_zeros(parameter.shape)


def _moments(x: Tensor, t: Tiling, has_mean: bool, eps: float) -> tuple:
    """(mean or None, var, 1 / sqrt(var + eps)) of the norms of an x that has elements."""
    var, rstd, squares = t.new(x), t.new(x), t.new(x, t.parts)
    mean, means = (t.new(x), t.new(x, t.parts)) if has_mean else (None, None)
    _statistics[t.sum_grid](x, means, squares, *t.view, t.part, t.parts, MEAN=has_mean,
                            **t.tile)  # fmt: skip
    _join[t.value_grid](means, squares, mean, var, rstd, t.count, t.norms, t.part, t.parts,
                        float(eps), MEAN=has_mean, **t.values)  # fmt: skip
    return mean, var, rstd


def channel_moments(x) -> tuple[Tensor, Tensor]:
    x = in_layout(x, _BATCH)
    if not x.numel():
        return tuple(x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    mean, var, _ = _moments(x, Tiling(x, _BATCH), True, 0.0)
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
    if statistics == _GIVEN:
        centre, rstd = running_mean.contiguous(), rstd_of(running_var, eps)
    else:
        centre, var, rstd = _moments(x, t, statistics != _PIXEL, eps)
        mean = mean if centre is None else centre
    _forward[t.grid](x, centre, rstd, row_of(weight), row_of(bias), y, *t.view, float(gain),
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
        inputs = (dy, x, row_of(mean), rstd, row_of(weight), row_of(bias))
        options = {"ACT": act, **t.tile}
        sums, values = t.new_sums(x, 2), t.new(x, 2)
        _backward_sums[t.sum_grid](*inputs, sums, *t.view, t.part, t.parts, float(gain),
                                   float(alpha), **options)  # fmt: skip
        _backward_values[t.value_grid](sums, rstd, values, dweight, dbias, t.norms, t.parts,
                                       t.share, t.mean_share, **t.values)  # fmt: skip
        _backward[t.grid](*inputs, values, dx, *t.view, float(gain), float(alpha), **options)
    none = x.new_empty(0)
    return dx, none if dweight is None else dweight, none.clone() if dbias is None else dbias

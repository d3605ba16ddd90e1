"""y = gain * act((x - mean) / sqrt(var + eps) * weight + bias) per channel, its backward and double
backward.

A dense tensor is seen as (channel, element of the channel): with dimension 1 at stride `inner`,
element e of channel c lies at (e // inner * channels + c) * inner + e % inner. A program takes a
tile of ELEMENTS x CHANNELS: one channel where its elements are neighbours, several where the
channels are (INNERMOST). Sums go over SPLITS parts of each channel; a second kernel adds the parts
in a fixed order and makes of them the few numbers a channel that the writing pass needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import _act, _curvature, _dense, _in_order_of, _slope
from .math import fp32

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_statistics": (56, 1024), "_join": (64, 1024), "_forward": (56, 0),
    "_backward_sums": (72, 1024), "_backward_values": (40, 1024), "_backward": (64, 0),
    "_double_backward_sums": (128, 1024), "_double_backward_values": (48, 1024),
    "_double_backward": (96, 0),
}  # fmt: skip

_TILE = 1024
_PROGRAMS = 1024  # of a sum: about eight for each SM of the largest GPUs


@triton.jit
def _at(element, last, channel, channels, inner, INNERMOST: tl.constexpr):
    """Offsets and mask of a tile."""
    e, c = element[:, None], channel[None, :]
    if INNERMOST:
        at = e.to(tl.int64) * channels + c
    else:
        at = ((e // inner).to(tl.int64) * channels + c) * inner + e % inner
    return at, (e < last) & (c < channels)


@triton.jit
def _value(ptr, channel, channels, MISSING: tl.constexpr):
    """A parameter's values for this program's channels."""
    if ptr is None:
        return tl.zeros_like(channel).to(tl.float32) + MISSING
    else:
        return tl.load(ptr + channel, channel < channels, 0.0).to(tl.float32)


@triton.jit
def _row(ptr, channel, channels, MISSING: tl.constexpr):
    return _value(ptr, channel, channels, MISSING)[None, :]


@triton.jit
def _element(x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels):
    """(normalised x, z)"""
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    mean, rstd = _row(mean_ptr, channel, channels, 0.0), _row(rstd_ptr, channel, channels, 1.0)
    normed = (x - mean) * rstd
    weight, bias = _row(weight_ptr, channel, channels, 1.0), _row(bias_ptr, channel, channels, 0.0)
    return normed, normed * weight + bias


@triton.jit
def _statistics(
    x_ptr, mean_ptr, squares_ptr, count, channels, inner, part,
    INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations from it of part of each channel; tiles joined by Chan's rule."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, count)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, last, ELEMENTS):
        at, mask = _at(start + tl.arange(0, ELEMENTS), last, channel, channels, inner, INNERMOST)
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        n = tl.minimum(last - start, ELEMENTS).to(tl.float32)
        before = (start - first).to(tl.float32)
        tile_mean = tl.sum(x, 0) / n
        deviation = tl.where(mask, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = n / (before + n)
        squares += tl.sum(deviation * deviation, 0) + delta * delta * before * share
        mean += delta * share
    to = tl.program_id(1) * channels + channel
    tl.store(mean_ptr + to, mean, channel < channels)
    tl.store(squares_ptr + to, squares, channel < channels)


@triton.jit
def _join(
    mean_parts, squares_parts, mean_ptr, var_ptr, rstd_ptr, count, channels, part, parts, eps,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PARTS)[:, None]
    mask = (p < parts) & (channel < channels)[None, :]
    at = p * channels + channel[None, :]
    n = tl.where(p < parts, tl.minimum(part, count - p * part), 0).to(tl.float32)
    means = tl.load(mean_parts + at, mask, 0.0)
    # About the first part's mean, so that a large one costs no digits.
    shift = tl.load(mean_parts + channel, channel < channels, 0.0)
    mean = shift + tl.sum(tl.where(mask, means - shift[None, :], 0.0) * n, 0) / count
    delta = tl.where(mask, means - mean[None, :], 0.0)
    squares = tl.sum(tl.load(squares_parts + at, mask, 0.0) + delta * delta * n, 0)
    var = squares / count
    tl.store(mean_ptr + channel, mean, channel < channels)
    tl.store(var_ptr + channel, var, channel < channels)
    tl.store(rstd_ptr + channel, 1.0 / tl.sqrt(var + fp32(eps)), channel < channels)


@triton.jit
def _forward(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, count, channels, inner, gain, alpha,
    ACT: tl.constexpr, INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    at, mask = _at(element, count, channel, channels, inner, INNERMOST)
    _, z = _element(x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels)
    y = _act(z, fp32(alpha), ACT) * fp32(gain)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _store_sum(ptr, k, value, mask, channel, channels):
    """Part program_id(1) of sum k: ptr is (sums, parts, channels)."""
    at = (k * tl.num_programs(1) + tl.program_id(1)) * channels + channel
    tl.store(ptr + at, tl.sum(tl.where(mask, value, 0.0), 0), channel < channels)


@triton.jit
def _sum(ptr, k, channel, channels, parts, PARTS: tl.constexpr):
    p = tl.arange(0, PARTS)[:, None]
    mask = (p < parts) & (channel < channels)[None, :]
    return tl.sum(tl.load(ptr + (k * parts + p) * channels + channel[None, :], mask, 0.0), 0)


@triton.jit
def _store_values(ptr, k, value, channel, channels):
    if ptr is not None:
        at = ptr + k * channels + channel
        tl.store(at, value.to(ptr.dtype.element_ty), channel < channels)


@triton.jit
def _backward_sums(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, count, channels, inner, part,
    gain, alpha, ACT: tl.constexpr, INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, count)
    gain, alpha = fp32(gain), fp32(alpha)
    g_sum = tl.zeros([ELEMENTS, CHANNELS], tl.float32)
    gn_sum = tl.zeros([ELEMENTS, CHANNELS], tl.float32)
    for start in range(first, last, ELEMENTS):
        at, mask = _at(start + tl.arange(0, ELEMENTS), last, channel, channels, inner, INNERMOST)
        n, z = _element(x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels)  # noqa: E501  # fmt: skip
        g = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * _slope(z, alpha, ACT) * gain
        g_sum += g
        gn_sum += g * n
    every = (channel < channels)[None, :]
    _store_sum(sum_ptr, 0, g_sum, every, channel, channels)
    _store_sum(sum_ptr, 1, gn_sum, every, channel, channels)


@triton.jit
def _backward_values(
    sum_ptr, rstd_ptr, weight_ptr, value_ptr, dweight_ptr, dbias_ptr, channels, parts, share,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    dbias = _sum(sum_ptr, 0, channel, channels, parts, PARTS)
    dweight = _sum(sum_ptr, 1, channel, channels, parts, PARTS)
    scale = _value(weight_ptr, channel, channels, 1.0) * _value(rstd_ptr, channel, channels, 1.0)
    share = fp32(share)
    _store_values(value_ptr, 0, scale, channel, channels)
    _store_values(value_ptr, 1, share * dbias, channel, channels)
    _store_values(value_ptr, 2, share * dweight, channel, channels)
    _store_values(dweight_ptr, 0, dweight, channel, channels)
    _store_values(dbias_ptr, 0, dbias, channel, channels)


@triton.jit
def _backward(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, value_ptr, dx_ptr, count, channels,
    inner, gain, alpha, ACT: tl.constexpr, INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    at, mask = _at(element, count, channel, channels, inner, INNERMOST)
    n, z = _element(x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels)
    g = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) * _slope(z, fp32(alpha), ACT) * fp32(gain)
    g -= _row(value_ptr + channels, channel, channels, 0.0)
    g -= n * _row(value_ptr + 2 * channels, channel, channels, 0.0)
    dx = g * _row(value_ptr, channel, channels, 0.0)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _double_element(
    gg_ptr, dy_ptr, x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels,
    gain, alpha, ACT: tl.constexpr,
):  # fmt: skip
    """(gg, normalised x, act' gain, dy act' gain, dy act'' gain)"""
    n, z = _element(x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    gg = tl.load(gg_ptr + at, mask, 0.0).to(tl.float32)
    s = _slope(z, alpha, ACT) * gain
    return gg, n, s, dy * s, dy * _curvature(z, alpha, ACT) * gain


@triton.jit
def _double_backward_sums(
    gg_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, count, channels,
    inner, part, gain, alpha, ACT: tl.constexpr, CURVED: tl.constexpr, INNERMOST: tl.constexpr,
    ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, count)
    gain, alpha = fp32(gain), fp32(alpha)
    zero = tl.zeros([ELEMENTS, CHANNELS], tl.float32)
    g_s, gn_s, gg_s, ggn_s, ggg_s = zero, zero, zero, zero, zero
    k_s, kn_s, knn_s, kgg_s, kggn_s = zero, zero, zero, zero, zero
    for start in range(first, last, ELEMENTS):
        at, mask = _at(start + tl.arange(0, ELEMENTS), last, channel, channels, inner, INNERMOST)
        gg, n, _, g, k = _double_element(gg_ptr, dy_ptr, x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels, gain, alpha, ACT)  # noqa: E501  # fmt: skip
        g_s += g
        gn_s += g * n
        gg_s += gg
        ggn_s += gg * n
        ggg_s += gg * g
        if CURVED:
            k_s += k
            kn_s += k * n
            knn_s += k * n * n
            kgg_s += k * gg
            kggn_s += k * gg * n
    every = (channel < channels)[None, :]
    _store_sum(sum_ptr, 0, g_s, every, channel, channels)
    _store_sum(sum_ptr, 1, gn_s, every, channel, channels)
    _store_sum(sum_ptr, 2, gg_s, every, channel, channels)
    _store_sum(sum_ptr, 3, ggn_s, every, channel, channels)
    _store_sum(sum_ptr, 4, ggg_s, every, channel, channels)
    if CURVED:
        _store_sum(sum_ptr, 5, k_s, every, channel, channels)
        _store_sum(sum_ptr, 6, kn_s, every, channel, channels)
        _store_sum(sum_ptr, 7, knn_s, every, channel, channels)
        _store_sum(sum_ptr, 8, kgg_s, every, channel, channels)
        _store_sum(sum_ptr, 9, kggn_s, every, channel, channels)


@triton.jit
def _double_backward_values(
    sum_ptr, gg_weight_ptr, gg_bias_ptr, rstd_ptr, weight_ptr, value_ptr, grad_weight_ptr,
    grad_bias_ptr, channels, parts, share, CURVED: tl.constexpr, PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Names and derivation: csrc/cpu/batch_norm_act.cpp."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = _sum(sum_ptr, 0, channel, channels, parts, PARTS)
    gn = _sum(sum_ptr, 1, channel, channels, parts, PARTS)
    gg = _sum(sum_ptr, 2, channel, channels, parts, PARTS)
    ggn = _sum(sum_ptr, 3, channel, channels, parts, PARTS)
    ggg = _sum(sum_ptr, 4, channel, channels, parts, PARTS)
    weight = _value(weight_ptr, channel, channels, 1.0)
    rstd = _value(rstd_ptr, channel, channels, 1.0)
    share = fp32(share)
    scale = weight * rstd
    u0 = _value(gg_bias_ptr, channel, channels, 0.0) - scale * share * gg
    u1 = _value(gg_weight_ptr, channel, channels, 0.0) - scale * share * ggn
    v0 = -scale * share * gn
    to_scale = ggg - share * (gg * g + ggn * gn)
    h, hn = g * 0.0, g * 0.0
    if CURVED:
        k = _sum(sum_ptr, 5, channel, channels, parts, PARTS)
        kn = _sum(sum_ptr, 6, channel, channels, parts, PARTS)
        knn = _sum(sum_ptr, 7, channel, channels, parts, PARTS)
        h = scale * _sum(sum_ptr, 8, channel, channels, parts, PARTS) + u0 * k + u1 * kn
        hn = scale * _sum(sum_ptr, 9, channel, channels, parts, PARTS) + u0 * kn + u1 * knn
    to_n = v0 * gg + u1 * g + weight * h
    to_nn = v0 * ggn + u1 * gn + weight * hn
    _store_values(value_ptr, 0, u0, channel, channels)
    _store_values(value_ptr, 1, u1, channel, channels)
    _store_values(value_ptr, 2, v0, channel, channels)
    _store_values(value_ptr, 3, -rstd * share * to_n, channel, channels)
    _store_values(value_ptr, 4, -rstd * share * (to_nn + scale * to_scale), channel, channels)
    _store_values(grad_weight_ptr, 0, rstd * to_scale + hn, channel, channels)
    _store_values(grad_bias_ptr, 0, h, channel, channels)


@triton.jit
def _double_backward(
    gg_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, value_ptr, grad_dy_ptr,
    grad_x_ptr, count, channels, inner, gain, alpha, ACT: tl.constexpr, CURVED: tl.constexpr,
    INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    at, mask = _at(element, count, channel, channels, inner, INNERMOST)
    gg, n, s, g, k = _double_element(gg_ptr, dy_ptr, x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, channels, fp32(gain), fp32(alpha), ACT)  # noqa: E501  # fmt: skip
    weight, rstd = _row(weight_ptr, channel, channels, 1.0), _row(rstd_ptr, channel, channels, 1.0)
    u1 = _row(value_ptr + channels, channel, channels, 0.0)
    u = weight * rstd * gg + _row(value_ptr, channel, channels, 0.0) + u1 * n
    tl.store(grad_dy_ptr + at, (u * s).to(grad_dy_ptr.dtype.element_ty), mask)
    to_n = _row(value_ptr + 2 * channels, channel, channels, 0.0) * gg + u1 * g
    if CURVED:
        to_n += weight * u * k
    grad_x = rstd * to_n + _row(value_ptr + 3 * channels, channel, channels, 0.0)
    grad_x += _row(value_ptr + 4 * channels, channel, channels, 0.0) * n
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


class _Tiling:
    """How a dense tensor is cut into tiles, and its channels into parts."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[1]
        self.count = x.numel() // max(self.channels, 1)
        inner = x.stride(1) if self.channels > 1 else max(self.count, 1)
        self.shape = (self.count, self.channels, inner)
        across = min(triton.next_power_of_2(max(self.channels, 1)), 64) if inner == 1 else 1
        down = min(triton.next_power_of_2(max(self.count, 1)), _TILE // across)
        self.tile = {"INNERMOST": inner == 1, "ELEMENTS": down, "CHANNELS": across}
        columns = triton.cdiv(self.channels, across)
        self.grid = (columns, triton.cdiv(self.count, down))
        # The shape alone decides the parts: the same bits on every GPU.
        most = max(1, min(_PROGRAMS // max(columns, 1), self.grid[1]))
        self.part = triton.cdiv(triton.cdiv(self.count, most), down) * down
        self.parts = triton.cdiv(self.count, max(self.part, 1))
        self.sum_grid = (columns, self.parts)
        parts = triton.next_power_of_2(max(self.parts, 1))
        own = max(1, min(64, 1024 // parts))
        self.values = {"PARTS": parts, "CHANNELS": own}
        self.value_grid = (triton.cdiv(self.channels, own),)

    def new(self, x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(*shape, self.channels, dtype=torch.float32)


def _row_of(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _rstd(var: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(var.float() + eps)


def _gradient_of(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Zeros: an empty x has no tile that would write the sums."""
    return None if parameter is None else torch.zeros_like(parameter, memory_format=torch.contiguous_format)  # noqa: E501  # fmt: skip


def batch_norm_act(
    x, running_mean, running_var, weight, bias, training, eps, act, gain, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    y = torch.empty_like(x)
    t = _Tiling(x)
    given = x.new_empty(0, dtype=torch.float32)
    mean, var = (t.new(x), t.new(x)) if training else (given, given.clone())
    if not x.numel():
        return y, mean, var
    if training:
        rstd = t.new(x)
        means, squares = t.new(x, t.parts), t.new(x, t.parts)
        _statistics[t.sum_grid](x, means, squares, *t.shape, t.part, **t.tile)
        _join[t.value_grid](means, squares, mean, var, rstd, t.count, t.channels, t.part, t.parts,
                            float(eps), **t.values)  # fmt: skip
        center = mean
    else:
        center, rstd = running_mean.contiguous(), _rstd(running_var, eps)
    _forward[t.grid](x, center, rstd, _row_of(weight), _row_of(bias), y, *t.shape, float(gain),
                     float(alpha), ACT=act, **t.tile)  # fmt: skip
    return y, mean, var


def batch_norm_act_backward(
    dy, x, mean, var, weight, bias, training, eps, act, gain, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    dy, dx = _in_order_of(dy, x), torch.empty_like(x)
    dweight, dbias = _gradient_of(weight, x), _gradient_of(bias, x)
    if x.numel():
        t = _Tiling(x)
        rstd, w = _rstd(var, eps), _row_of(weight)
        inputs = (dy, x, mean.contiguous(), rstd, w, _row_of(bias))
        options = {"ACT": act, **t.tile}
        sums, values = t.new(x, 2, t.parts), t.new(x, 3)
        _backward_sums[t.sum_grid](*inputs, sums, *t.shape, t.part, float(gain), float(alpha),
                                   **options)  # fmt: skip
        share = 1.0 / t.count if training else 0.0
        _backward_values[t.value_grid](sums, rstd, w, values, dweight, dbias, t.channels, t.parts,
                                       share, **t.values)  # fmt: skip
        _backward[t.grid](*inputs, values, dx, *t.shape, float(gain), float(alpha), **options)
    none = x.new_empty(0)
    return dx, none if dweight is None else dweight, none.clone() if dbias is None else dbias


def batch_norm_act_double_backward(
    gg, gg_weight, gg_bias, dy, x, mean, var, weight, bias, training, eps, act, gain, alpha
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _dense(x)
    gg, dy = _in_order_of(gg, x), _in_order_of(dy, x)
    grad_dy, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_weight, grad_bias = _gradient_of(weight, x), _gradient_of(bias, x)
    if x.numel():
        t = _Tiling(x)
        rstd, w = _rstd(var, eps), _row_of(weight)
        inputs = (gg, dy, x, mean.contiguous(), rstd, w, _row_of(bias))
        curved = act > 2  # linear, relu and lrelu are straight
        options = {"ACT": act, "CURVED": curved, **t.tile}
        sums, values = t.new(x, 10 if curved else 5, t.parts), t.new(x, 5)
        _double_backward_sums[t.sum_grid](*inputs, sums, *t.shape, t.part, float(gain),
                                          float(alpha), **options)  # fmt: skip
        share = 1.0 / t.count if training else 0.0
        _double_backward_values[t.value_grid](
            sums, _row_of(gg_weight), _row_of(gg_bias), rstd, w, values, grad_weight, grad_bias,
            t.channels, t.parts, share, CURVED=curved, **t.values,
        )  # fmt: skip
        _double_backward[t.grid](*inputs, values, grad_dy, grad_x, *t.shape, float(gain),
                                 float(alpha), **options)  # fmt: skip
    none = x.new_empty(0)
    return (grad_dy, grad_x, none if grad_weight is None else grad_weight,
            none.clone() if grad_bias is None else grad_bias)  # fmt: skip

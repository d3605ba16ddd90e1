"""The derivative of norm_act_backward; names and sums: csrc/cpu/norm_act_double_backward.cpp."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import curvature, slope
from .math import fp32
from .memory_order import in_order_of
from .norm_tiles import (
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
BUDGET = {"_sums": (176, 1024), "_values": (64, 1024), "_gradients": (160, 0)}


@triton.jit
def _element(
    gg_ptr, dy_ptr, x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, norm, known, gain,
    alpha, ACT: tl.constexpr,
):  # fmt: skip
    """(gg, x - mean, weight / deviation, act' gain, dy act' gain, dy act'' gain)"""
    x = centred(x_ptr, at, mask, mean_ptr, norm, known)
    scale, z = affine(x, rstd_ptr, weight_ptr, bias_ptr, norm, known)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    gg = tl.load(gg_ptr + at, mask, 0.0).to(tl.float32)
    s = slope(z, alpha, ACT) * gain
    return gg, x, scale, s, dy * s, dy * (curvature(z, alpha, ACT) * gain)


@triton.jit
def _sums(
    gg_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, samples, rows,
    channels, inner, count, part, parts, gain, alpha, ACT: tl.constexpr, CURVED: tl.constexpr,
    INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, channel, number = place(samples, channels, CHANNELS)
    norm, known = sample * channels + channel, channel < channels
    last = tl.minimum(number * part + part, count)
    gain, alpha = fp32(gain), fp32(alpha)
    zero = tl.zeros([ELEMENTS, CHANNELS], tl.float32)
    g_s, gx_s, gg_s, ggx_s, ggg_s = zero, zero, zero, zero, zero
    k_s, kx_s, kxx_s, kgg_s, kggx_s = zero, zero, zero, zero, zero
    for start in range(number * part, last, ELEMENTS):
        element = start + tl.arange(0, ELEMENTS)
        at, mask = offsets(sample, element, last, channel, rows, channels, inner, INNERMOST)
        gg, x, _, _, g, k = _element(gg_ptr, dy_ptr, x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, norm, known, gain, alpha, ACT)  # noqa: E501  # fmt: skip
        g_s += g
        gx_s += g * x
        gg_s += gg
        ggx_s += gg * x
        ggg_s += gg * g
        if CURVED:
            k_s += k
            kx_s += k * x
            kxx_s += k * x * x
            kgg_s += k * gg
            kggx_s += k * gg * x
    norms = samples * channels
    store_part(sum_ptr, 0, g_s, number, parts, norm, norms, known)
    store_part(sum_ptr, 1, gx_s, number, parts, norm, norms, known)
    store_part(sum_ptr, 2, gg_s, number, parts, norm, norms, known)
    store_part(sum_ptr, 3, ggx_s, number, parts, norm, norms, known)
    store_part(sum_ptr, 4, ggg_s, number, parts, norm, norms, known)
    if CURVED:
        store_part(sum_ptr, 5, k_s, number, parts, norm, norms, known)
        store_part(sum_ptr, 6, kx_s, number, parts, norm, norms, known)
        store_part(sum_ptr, 7, kxx_s, number, parts, norm, norms, known)
        store_part(sum_ptr, 8, kgg_s, number, parts, norm, norms, known)
        store_part(sum_ptr, 9, kggx_s, number, parts, norm, norms, known)


@triton.jit
def _values(
    sum_ptr, gg_weight_ptr, gg_bias_ptr, rstd_ptr, weight_ptr, value_ptr, grad_weight_ptr,
    grad_bias_ptr, norms, parts, share, mean_share, CURVED: tl.constexpr, PARTS: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    norm = tl.program_id(0).to(tl.int64) * NORMS + tl.arange(0, NORMS)
    known = norm < norms
    weight, rstd = value_or(weight_ptr, norm, known, 1.0), value_or(rstd_ptr, norm, known, 1.0)
    share, mean_share, scale = fp32(share), fp32(mean_share), weight * rstd
    g = total(sum_ptr, 0, norm, norms, parts, PARTS)
    gn = total(sum_ptr, 1, norm, norms, parts, PARTS) * rstd
    gg = total(sum_ptr, 2, norm, norms, parts, PARTS)
    ggn = total(sum_ptr, 3, norm, norms, parts, PARTS) * rstd
    ggg = total(sum_ptr, 4, norm, norms, parts, PARTS)
    to_weight = value_or(gg_weight_ptr, norm, known, 0.0)
    to_bias = value_or(gg_bias_ptr, norm, known, 0.0)
    by_gg, by_g = -scale * share * gn, to_weight - scale * share * ggn
    to_scale = ggg - mean_share * gg * g - share * ggn * gn
    h, hn = g * 0.0, g * 0.0
    if CURVED:
        k = total(sum_ptr, 5, norm, norms, parts, PARTS)
        kn = total(sum_ptr, 6, norm, norms, parts, PARTS) * rstd
        knn = total(sum_ptr, 7, norm, norms, parts, PARTS) * rstd * rstd
        u0 = to_bias - scale * mean_share * gg
        h = scale * total(sum_ptr, 8, norm, norms, parts, PARTS) + u0 * k + by_g * kn
        kggn = total(sum_ptr, 9, norm, norms, parts, PARTS) * rstd
        hn = scale * kggn + u0 * kn + by_g * knn
    v = by_gg * gg + by_g * g + weight * h
    vn = by_gg * ggn + by_g * gn + weight * hn
    store_value(value_ptr, 0, mean_share * gg, norm, norms)
    store_value(value_ptr, 1, share * ggn * rstd, norm, norms)
    store_value(value_ptr, 2, to_weight * rstd, norm, norms)
    store_value(value_ptr, 3, to_bias, norm, norms)
    store_value(value_ptr, 4, by_gg, norm, norms)
    store_value(value_ptr, 5, by_g, norm, norms)
    store_value(value_ptr, 6, mean_share * v, norm, norms)
    store_value(value_ptr, 7, share * (vn + scale * to_scale) * rstd, norm, norms)
    store_value(grad_weight_ptr, 0, rstd * to_scale + hn, norm, norms)
    store_value(grad_bias_ptr, 0, h, norm, norms)


@triton.jit
def _row(ptr, k, norm, norms, known):
    return value_or(ptr + k * norms, norm, known, 0.0)[None, :]


@triton.jit
def _gradients(
    gg_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, value_ptr, grad_dy_ptr,
    grad_x_ptr, samples, rows, channels, inner, count, gain, alpha, ACT: tl.constexpr,
    CURVED: tl.constexpr, INNERMOST: tl.constexpr, ELEMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, channel, number = place(samples, channels, CHANNELS)
    element = number * ELEMENTS + tl.arange(0, ELEMENTS)
    at, mask = offsets(sample, element, count, channel, rows, channels, inner, INNERMOST)
    norm, known = sample * channels + channel, channel < channels
    gg, x, scale, s, g, k = _element(gg_ptr, dy_ptr, x_ptr, at, mask, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, norm, known, fp32(gain), fp32(alpha), ACT)  # noqa: E501  # fmt: skip
    norms = samples * channels
    u = gg - _row(value_ptr, 0, norm, norms, known) - x * _row(value_ptr, 1, norm, norms, known)
    u = u * scale + x * _row(value_ptr, 2, norm, norms, known)
    u += _row(value_ptr, 3, norm, norms, known)
    tl.store(grad_dy_ptr + at, (u * s).to(grad_dy_ptr.dtype.element_ty), mask)
    v = gg * _row(value_ptr, 4, norm, norms, known) + g * _row(value_ptr, 5, norm, norms, known)
    if CURVED:
        v += u * k * value_or(weight_ptr, norm, known, 1.0)[None, :]
    v -= _row(value_ptr, 6, norm, norms, known) + x * _row(value_ptr, 7, norm, norms, known)
    v *= value_or(rstd_ptr, norm, known, 1.0)[None, :]
    tl.store(grad_x_ptr + at, v.to(grad_x_ptr.dtype.element_ty), mask)


def norm_act_double_backward(
    gg, gg_weight, gg_bias, dy, x, mean, var, weight, bias, statistics, eps, act, gain, alpha
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = in_layout(x, statistics)
    gg, dy = in_order_of(gg, x), in_order_of(dy, x)
    grad_dy, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_weight, grad_bias = gradient_of(weight), gradient_of(bias)
    if x.numel():
        t = Tiling(x, statistics)
        rstd = rstd_of(var, eps)
        mean, weight, bias = contiguous(mean, weight, bias)
        inputs = (gg, dy, x, mean, rstd, weight, bias)
        curved = act > 2  # linear, relu and lrelu are straight
        options = {"ACT": act, "CURVED": curved, **t.tile}
        sums, values = t.new_sums(x, 10 if curved else 5), t.new(x, 8)
        _sums[t.sum_grid](*inputs, sums, *t.view, t.part, t.parts, float(gain), float(alpha),
                          **options)  # fmt: skip
        _values[t.value_grid](sums, *contiguous(gg_weight, gg_bias), rstd, weight, values,
                              grad_weight, grad_bias, t.norms, t.parts, t.share, t.mean_share,
                              CURVED=curved, **t.values)  # fmt: skip
        _gradients[t.grid](*inputs, values, grad_dy, grad_x, *t.view, float(gain), float(alpha),
                           **options)  # fmt: skip
    of_parameters = (x.new_empty(0) if g is None else g for g in (grad_weight, grad_bias))
    return grad_dy, grad_x, *of_parameters

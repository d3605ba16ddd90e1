"""Zero-insertion, padding, FIR filter and decimation of images, with bias and activation.

A program takes BLOCK outputs in memory order. Of every `up` taps in a direction one meets a pixel
and the others the zeros between: only those are visited, so up 2 with a 4x4 filter loads 2x2
pixels an output. A separable filter is two launches, with fp32 between them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .math import fp32
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_upfirdn2d": (104, 0)}

_BLOCK = 512


@triton.jit
def _narrowed(number, size):
    """`number`, but none above `size`: in 32 bits where these fit, whose divisions take half of the
    instructions."""
    like = tl.full((), 0, tl.int32) + size  # a size of 1 comes as a constant
    return tl.minimum(number, size).to(like.dtype)


@triton.jit
def _first_tap(at, UP: tl.constexpr):
    """The first tap that meets a pixel, (at + tap) % UP == 0, and that pixel."""
    if UP == 1:
        return 0, at
    else:
        tap = (UP - (at % UP + UP) % UP) % UP
        # A tap before the image divides to a negative whole number: exact, however it rounds.
        return tap, (at + tap) // UP


@triton.jit
def _upfirdn2d(
    x_ptr, filter_ptr, bias_ptr, y_ptr, size, channels, in_h, in_w, out_h, out_w, down_x, down_y,
    left, top, gain, act_gain, limit, alpha, height: tl.constexpr, width: tl.constexpr,
    up_x: tl.constexpr, up_y: tl.constexpr, phases_x: tl.constexpr, phases_y: tl.constexpr,
    FLIP: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = number < size
    o = _narrowed(number, size)
    if LAST:  # channels_last
        c, pixel = (o % channels).to(tl.int32), o // channels
        step = channels
    else:
        pixel, step = o, 1
    ox, row = (pixel % out_w).to(tl.int32), pixel // out_w
    oy, plane = (row % out_h).to(tl.int32), row // out_h
    tap_x, first_x = _first_tap(ox * down_x - left, up_x)
    tap_y, first_y = _first_tap(oy * down_y - top, up_y)
    x_ptr += (plane.to(tl.int64) * in_h + first_y) * in_w * step + first_x * step
    if LAST:
        x_ptr += c
    else:
        c = (plane % channels).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(phases_y):
        ky, iy = tap_y + j * up_y, first_y + j
        fits_y = mask & (ky < height) & (iy >= 0) & (iy < in_h)
        for i in range(phases_x):
            kx, ix = tap_x + i * up_x, first_x + i
            fits = fits_y & (kx < width) & (ix >= 0) & (ix < in_w)
            tap = ky * width + kx if FLIP else (height - 1 - ky) * width + width - 1 - kx
            # Without upsampling all outputs meet the same tap: one load for all of them.
            weight = tl.load(filter_ptr + tap, (ky < height) & (kx < width), 0.0).to(tl.float32)
            x = tl.load(x_ptr + (j * in_w + i) * step, fits, 0.0).to(tl.float32)
            total += x * weight
    total *= fp32(gain)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask, 0.0).to(tl.float32)
    y = activate(total, fp32(alpha), ACT) * fp32(act_gain)
    limit = fp32(limit)
    y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))  # keeps NaN
    tl.store(y_ptr + number, y.to(y_ptr.dtype.element_ty), mask)


def _launch(x, filter, geometry, flip, gain, bias, act, act_gain, clamp, alpha, dtype) -> Tensor:
    up_x, up_y, down_x, down_y, left, right, top, bottom = geometry
    n, c, h, w = x.shape
    height, width = filter.shape
    out_h = (h * up_y + top + bottom - height) // down_y + 1
    out_w = (w * up_x + left + right - width) // down_x + 1
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    x = x if last else x.contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty((n, c, out_h, out_w), dtype=dtype, device=x.device, memory_format=layout)
    if y.numel():
        grid = (triton.cdiv(y.numel(), _BLOCK),)
        limit = float("inf") if clamp is None else float(clamp)
        _upfirdn2d[grid](
            x, filter, bias, y, y.numel(), c, h, w, out_h, out_w, down_x, down_y, left, top,
            float(gain), float(act_gain), limit, float(alpha), height=height, width=width,
            up_x=up_x, up_y=up_y, phases_x=triton.cdiv(width, up_x),
            phases_y=triton.cdiv(height, up_y), FLIP=flip, LAST=last, ACT=act, BLOCK=_BLOCK,
        )  # fmt: skip
    return y


def upfirdn2d(
    x, filter, geometry, flip, gain, bias=None, act=0, act_gain=1.0, clamp=None, alpha=0.2
) -> Tensor:
    filter, bias = contiguous(filter, bias)
    epilogue = (bias, act, act_gain, clamp, alpha, x.dtype)
    if filter.dim() == 2:
        return _launch(x, filter, geometry, flip, gain, *epilogue)
    up_x, up_y, down_x, down_y, left, right, top, bottom = geometry
    across = (up_x, 1, down_x, 1, left, right, 0, 0)
    down = (1, up_y, 1, down_y, 0, 0, top, bottom)
    rows = _launch(x, filter[None], across, flip, 1.0, None, 0, 1.0, None, 0.2, torch.float32)
    return _launch(rows, filter[:, None], down, flip, gain, *epilogue)

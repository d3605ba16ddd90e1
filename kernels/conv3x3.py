"""y = residual + gain * prelu(conv(x, weight) + bias), 3x3 with a border of zeros.

An implicit matrix product: a program takes a block of pixels by a block of outputs and adds, tap by
tap, the products of the pixels' neighbours. Channels are innermost, so that a tap is an offset.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import INTERPRETED, fp32
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed.
#: Of 240 registers two programs of four warps fit a multiprocessor, as of 224.
BUDGET = {"_conv": (240, 32768)}

_PIXELS = 64


@triton.jit
def _conv(
    x_ptr, weight_ptr, bias_ptr, slope_ptr, residual_ptr, y_ptr, pixels, height, width, channels,
    outputs, gain, IN_FP32: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output = output < outputs
    row, column = pixel // width % height, pixel % width
    sums = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for tap in range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (pixel < pixels) & (row + down >= 0) & (row + down < height)
        inside = inside & (column + right >= 0) & (column + right < width)
        at = (pixel + down * width + right) * channels
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            is_channel = channel < channels
            x = tl.load(
                x_ptr + at[:, None] + channel[None, :], inside[:, None] & is_channel[None, :], 0.0
            )
            weight = tl.load(
                weight_ptr + (tap * channels + channel)[:, None] * outputs + output[None, :],
                is_channel[:, None] & is_output[None, :], 0.0,
            )  # fmt: skip
            if IN_FP32:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            sums = tl.dot(x, weight, sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + output, is_output, 0.0).to(tl.float32)[None, :]
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + output, is_output, 0.0).to(tl.float32)
        sums = tl.where(sums > 0, sums, sums * slope[None, :])
    sums *= fp32(gain)
    to = pixel[:, None] * outputs + output[None, :]
    mask = (pixel < pixels)[:, None] & is_output[None, :]
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + to, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + to, sums.to(y_ptr.dtype.element_ty), mask)


def _innermost(x: Tensor) -> Tensor:
    """x in channels_last memory order, also where a dimension of one element hides its stride."""
    return x.permute(0, 2, 3, 1).contiguous()


def conv3x3(xs, weight, bias, slope, residual, gain) -> Tensor:
    x = _innermost(torch.cat(xs, 1) if len(xs) > 1 else xs[0])
    batch, height, width, channels = x.shape
    outputs = weight.shape[0]
    y = x.new_empty(batch, height, width, outputs)
    pixels = batch * height * width
    if pixels:
        block_o = max(16, min(64, triton.next_power_of_2(outputs)))
        block_c = 16 if channels <= 16 else 32
        grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(outputs, block_o))
        _conv[grid](x, weight.permute(2, 3, 1, 0).contiguous(), *contiguous(bias, slope),
                    None if residual is None else _innermost(residual), y, pixels, height, width,
                    channels, outputs, float(gain), IN_FP32=INTERPRETED, BLOCK_P=_PIXELS,
                    BLOCK_O=block_o, BLOCK_C=block_c)  # fmt: skip
    return y.permute(0, 3, 1, 2)

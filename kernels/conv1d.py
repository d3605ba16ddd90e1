"""y = gain * (conv(leaky_relu(x), weight) + bias + residuals) along time, and transposed.

An implicit matrix product: a program takes a block of steps by a block of outputs and adds, tap by
tap, the products of the steps' inputs. Channels are innermost, so that a tap is an offset. A
transposed convolution is one such product for every phase of its stride.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import INTERPRETED, fp32

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_conv": (255, 32768)}

_STEPS = 64


@triton.jit
def _conv(
    x_ptr, weight_ptr, bias_ptr, first_ptr, second_ptr, third_ptr, y_ptr, time, length, channels,
    outputs, taps, apart, stride, padding, dilation, slope, gain, TRANSPOSED: tl.constexpr,
    IN_FP32: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Outputs phase, phase + apart, ... are one convolution; apart is 1 but where it is TRANSPOSED.
    blocks = tl.cdiv(tl.cdiv(length, apart), BLOCK_T)
    phase = tl.program_id(0) // blocks
    step = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    batch = tl.program_id(2).to(tl.int64)
    is_output = output < outputs
    sums = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    first, own_taps = 0, taps
    if TRANSPOSED:
        first = (phase + padding) % apart
        own_taps = (taps - first + apart - 1) // apart
    for i in range(own_taps):
        if TRANSPOSED:
            tap, at = first + i * apart, step + (phase + padding) // apart - i
        else:
            tap, at = i, step * stride - padding + i * dilation
        inside = (at >= 0) & (at < time)
        row = (batch * time + at) * channels
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            is_channel = channel < channels
            x = tl.load(
                x_ptr + row[:, None] + channel[None, :], inside[:, None] & is_channel[None, :], 0.0
            )
            bent = x.to(tl.float32)
            bent = tl.where(bent > 0, bent, bent * fp32(slope))
            weight = tl.load(
                weight_ptr + (tap * channels + channel)[:, None] * outputs + output[None, :],
                is_channel[:, None] & is_output[None, :], 0.0,
            )  # fmt: skip
            if IN_FP32:
                weight = weight.to(tl.float32)
            else:
                bent = bent.to(weight.dtype)
            sums = tl.dot(bent, weight, sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + output, is_output, 0.0).to(tl.float32)[None, :]
    position = phase + step * apart
    to = (batch * length + position)[:, None] * outputs + output[None, :]
    mask = (position < length)[:, None] & is_output[None, :]
    if first_ptr is not None:
        sums += tl.load(first_ptr + to, mask, 0.0).to(tl.float32)
    if second_ptr is not None:
        sums += tl.load(second_ptr + to, mask, 0.0).to(tl.float32)
    if third_ptr is not None:
        sums += tl.load(third_ptr + to, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + to, (sums * fp32(gain)).to(y_ptr.dtype.element_ty), mask)


def conv1d(x, weight, bias, residuals, stride, padding, dilation, slope, gain) -> Tensor:
    length = (x.shape[2] + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1
    places = (1, stride, padding, dilation, slope, gain)
    return _launch(x, weight.permute(2, 1, 0), bias, residuals, length, places, transposed=False)


def conv_transpose1d(x, weight, bias, stride, padding, slope) -> Tensor:
    length = (x.shape[2] - 1) * stride + weight.shape[2] - 2 * padding
    places = (stride, 1, padding, 1, slope, 1.0)
    return _launch(x, weight.permute(2, 0, 1), bias, [], length, places, transposed=True)


def _launch(x, weight, bias, residuals, length, places, transposed) -> Tensor:
    """weight: (taps, in, out)."""
    x, weight = _innermost(x), weight.contiguous()
    batch, time, channels = x.shape
    taps, _channels, outputs = weight.shape
    y = x.new_empty(batch, length, outputs)
    if y.numel():
        apart, stride, padding, dilation, slope, gain = places
        block_o = max(16, min(64, triton.next_power_of_2(outputs)))
        block_c = 16 if channels <= 16 else 32
        optional = [_innermost(residual) for residual in residuals] + [None] * 3
        blocks = triton.cdiv(triton.cdiv(length, apart), _STEPS)
        in_fp32 = INTERPRETED or x.dtype == torch.float32
        grid = (blocks * min(apart, length), triton.cdiv(outputs, block_o), batch)
        _conv[grid](x, weight, None if bias is None else bias.contiguous(), *optional[:3], y, time,
                    length, channels, outputs, taps, apart, stride, padding, dilation, float(slope),
                    float(gain), TRANSPOSED=transposed, IN_FP32=in_fp32, BLOCK_T=_STEPS,
                    BLOCK_O=block_o, BLOCK_C=block_c)  # fmt: skip
    return y.transpose(1, 2)


def _innermost(x: Tensor) -> Tensor:
    """(batch, time, channels), contiguous."""
    return x.transpose(1, 2).contiguous()

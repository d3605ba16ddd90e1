"""y = gain * (conv(leaky_relu(x), weight) + bias + residuals) along time, and transposed; the
gradient of weight.

An implicit matrix product: a program takes a block of steps by a block of outputs and adds, tap by
tap, the products of the steps' inputs. Channels are innermost, so that a tap is an offset. A
transposed convolution is one such product for every phase of its stride. For the gradient of weight
a program takes a block of outputs by a block of inputs, one tap, and a part of all steps.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import INTERPRETED, fp32
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_conv": (255, 32768), "_weight_gradient": (255, 32768)}

_STEPS = 64
#: Programs that the gradient of a small weight should have: its time is shared by as many.
_PROGRAMS = 512


@triton.jit
def _leaky_relu(x, slope):
    wide = x.to(tl.float32)
    return tl.where(wide > 0, wide, wide * fp32(slope))


@triton.jit
def _conv(
    x_ptr, weight_ptr, bias_ptr, first_ptr, second_ptr, third_ptr, gate_ptr, y_ptr, time, length,
    channels, outputs, taps, apart, stride, padding, dilation, common, inverse, slope, gain,
    gate_slope, TRANSPOSED: tl.constexpr, IN_FP32: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Outputs phase, phase + apart, ... are one convolution; apart is 1 but where it is TRANSPOSED.
    blocks = tl.cdiv(tl.cdiv(length, apart), BLOCK_T)
    # Samples in the first dimension of the grid too: the others end at 65,535.
    of_sample = blocks * tl.minimum(apart, length)
    batch = (tl.program_id(0) // of_sample).to(tl.int64)
    phase = tl.program_id(0) % of_sample // blocks
    step = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output = output < outputs
    sums = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    first, own_taps, every = 0, taps, 1
    if TRANSPOSED:
        # Taps for which phase + padding - tap * dilation is a multiple of `apart`.
        every = apart // common
        first = (phase + padding) // common * inverse % every
        own_taps = (taps - first + every - 1) // every
        if (phase + padding) % common != 0:
            own_taps = 0
    for i in range(own_taps):
        if TRANSPOSED:
            tap = first + i * every
            at = step + (phase + padding - first * dilation) // apart - i * (dilation // common)
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
            bent = _leaky_relu(x, slope)
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
    sums *= fp32(gain)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + to, mask, 0.0).to(tl.float32)
        sums = tl.where(gate > 0, sums, sums * fp32(gate_slope))
    tl.store(y_ptr + to, sums.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _weight_gradient(
    grad_ptr, x_ptr, parts_ptr, steps, length, time, channels, outputs, taps, stride, padding,
    dilation, grad_slope, slope, IN_FP32: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Part p takes blocks p, p + parts, ... of the steps of all samples, which follow one another.
    blocks = tl.cdiv(channels, BLOCK_C)
    output = tl.program_id(0) // blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tap, part = tl.program_id(1), tl.program_id(2)
    is_output, is_channel = output < outputs, channel < channels
    sums = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for start in range(part * BLOCK_T, steps, tl.num_programs(2) * BLOCK_T):
        step = start + tl.arange(0, BLOCK_T).to(tl.int64)
        at = step % length * stride - padding + tap * dilation
        # Beyond x the gradient counts as zero too: zero times infinity would not be.
        inside = (step < steps) & (at >= 0) & (at < time)
        grad = tl.load(
            grad_ptr + (step * outputs)[None, :] + output[:, None],
            is_output[:, None] & inside[None, :], 0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + ((step // length * time + at) * channels)[:, None] + channel[None, :],
            inside[:, None] & is_channel[None, :], 0.0,
        )  # fmt: skip
        grad_bent, x_bent = _leaky_relu(grad, grad_slope), _leaky_relu(x, slope)
        if not IN_FP32:
            grad_bent, x_bent = grad_bent.to(grad.dtype), x_bent.to(x.dtype)
        sums = tl.dot(grad_bent, x_bent, sums, input_precision="ieee")
    to = ((part * taps + tap).to(tl.int64) * outputs + output)[:, None] * channels
    tl.store(parts_ptr + to + channel[None, :], sums, is_output[:, None] & is_channel[None, :])


def conv1d(
    x, weight, bias, residuals, stride, padding, dilation, slope, gain, gate=None, gate_slope=1.0
) -> Tensor:
    length = (x.shape[2] + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1
    places = (1, stride, padding, dilation, 1, 0)
    factors = (float(slope), float(gain), float(gate_slope))
    weight = weight.permute(2, 1, 0)
    return _launch(x, weight, bias, residuals, gate, length, places, factors, transposed=False)


def conv_transpose1d(
    x, weight, bias, stride, padding, slope, output_padding=0, dilation=1, gate=None, gate_slope=1.0
) -> Tensor:
    reach = dilation * (weight.shape[2] - 1) + 1
    length = (x.shape[2] - 1) * stride + reach - 2 * padding + output_padding
    common = math.gcd(stride, dilation)
    places = (stride, 1, padding, dilation, common, pow(dilation // common, -1, stride // common))
    factors = (float(slope), 1.0, float(gate_slope))
    weight = weight.permute(2, 0, 1)
    return _launch(x, weight, bias, [], gate, length, places, factors, transposed=True)


def conv1d_backward_weight(grad, x, taps, stride, padding, dilation, grad_slope, slope) -> Tensor:
    grad, x = _innermost(grad), _innermost(x)
    (batch, length, outputs), (_batch, time, channels) = grad.shape, x.shape
    # 64 by 64 would spill on sm_80.
    block_o = max(16, min(64, triton.next_power_of_2(outputs)))
    block_c = 16 if channels <= 16 else 32
    blocks = triton.cdiv(outputs, block_o) * triton.cdiv(channels, block_c)
    steps = batch * length
    parts = max(1, min(_PROGRAMS // (blocks * taps), triton.cdiv(steps, _STEPS)))
    sums = x.new_empty(parts, taps, outputs, channels, dtype=torch.float32)
    if sums.numel():
        in_fp32 = INTERPRETED or x.dtype == torch.float32
        _weight_gradient[blocks, taps, parts](
            grad, x, sums, steps, length, time, channels, outputs, taps, stride, padding, dilation,
            float(grad_slope), float(slope), IN_FP32=in_fp32, BLOCK_T=32, BLOCK_O=block_o,
            BLOCK_C=block_c,
        )  # fmt: skip
    return sums.sum(0).permute(1, 2, 0).to(x.dtype).contiguous()


def _launch(x, weight, bias, residuals, gate, length, places, factors, transposed) -> Tensor:
    """weight: (taps, in, out)."""
    x, weight = _innermost(x), weight.contiguous()
    batch, time, channels = x.shape
    taps, _channels, outputs = weight.shape
    y = x.new_empty(batch, length, outputs)
    if y.numel():
        apart = places[0]
        block_o = max(16, min(64, triton.next_power_of_2(outputs)))
        block_c = 16 if channels <= 16 else 32
        residuals = [_innermost(residual) for residual in residuals] + [None] * 3
        gate = None if gate is None else _innermost(gate)
        blocks = triton.cdiv(triton.cdiv(length, apart), _STEPS)
        in_fp32 = INTERPRETED or x.dtype == torch.float32
        grid = (batch * min(apart, length) * blocks, triton.cdiv(outputs, block_o))
        _conv[grid](x, weight, *contiguous(bias), *residuals[:3], gate, y,
                    time, length, channels, outputs, taps, *places, *factors, TRANSPOSED=transposed,
                    IN_FP32=in_fp32, BLOCK_T=_STEPS, BLOCK_O=block_o, BLOCK_C=block_c)  # fmt: skip
    return y.transpose(1, 2)


def _innermost(x: Tensor) -> Tensor:
    """(batch, time, channels), contiguous."""
    return x.transpose(1, 2).contiguous()

"""Convolutions along time with what vocoders have around them, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._checks import check_positive, check_tensor
from aigc_fast.ops._layout import channels_innermost
from aigc_fast.ops._registry import define

_MAX_RESIDUALS = 3


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residuals: Sequence[Tensor] = (),
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    slope: float = 1.0,
    gain: float = 1.0,
) -> Tensor:
    """y = gain * (conv(leaky_relu(x, slope), weight) + bias + sum of residuals).

    x:         (batch, in, time), float64/32/16 or bfloat16, of any strides; read fastest where
               channels are innermost, as in the result.
    weight:    (out, in, taps), dtype of x, of any strides.
    bias:      (out,), dtype of x, or None.
    residuals: up to three tensors of the result's shape and dtype.
    stride:    steps of x between two steps of the result.
    padding:   zeros before and after every sequence.
    dilation:  steps between two taps.
    slope:     what negative values of x are multiplied by: 1 leaves them, 0 is a ReLU.

    Returns (batch, out, (time + 2 * padding - dilation * (taps - 1) - 1) // stride + 1), channels
    innermost in memory.
    Computes in fp32 (fp64 for fp64) and rounds once; bfloat16 on a CPU is rounded once more between
    leaky_relu and the products. Bytes that must move: x, residuals and y once.

    Inference only; `models.vocoder` takes torch's operations where a gradient is wanted.

    Raises TypeError or ValueError for a wrong dtype, shape or device; RuntimeError if a gradient is
    asked for.
    """
    residuals = list(residuals)
    _refuse_gradients("conv1d", x, weight, bias, *residuals)
    return _conv1d(x, weight, bias, residuals, stride, padding, dilation, slope, gain)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    slope: float = 1.0,
) -> Tensor:
    """y = conv_transpose(leaky_relu(x, slope), weight) + bias: `stride` outputs for every input.

    x, bias, slope: as for `conv1d`.
    weight:  (in, out, taps), dtype of x, of any strides.
    stride:  steps of the result between two inputs. Every stride-th output is one convolution of
             the inputs, with every stride-th tap: no product with an inserted zero is made.
    padding: steps that are left out at the beginning and the end of the result.

    Returns (batch, out, (time - 1) * stride + taps - 2 * padding), channels innermost in memory.
    Arithmetic, derivatives and errors as for `conv1d`.
    """
    _refuse_gradients("conv_transpose1d", x, weight, bias)
    return _conv_transpose1d(x, weight, bias, stride, padding, slope)


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{name} has no derivative: call it under torch.no_grad()")


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residuals: list[Tensor],
    stride: int,
    padding: int,
    dilation: int,
    slope: float,
    gain: float,
) -> Tensor:
    y = F.conv1d(_bent(x, slope), weight, bias, stride, padding, dilation)
    for residual in residuals:
        y = y + residual
    return channels_innermost(y * gain if gain != 1 else y)


def _reference_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, slope: float
) -> Tensor:
    y = F.conv_transpose1d(_bent(x, slope), weight, bias, stride=stride, padding=padding)
    return channels_innermost(y)


def _bent(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope) if slope != 1 else x


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residuals: list[Tensor],
    stride: int,
    padding: int,
    dilation: int,
    *_: Any,
) -> None:
    out, taps = _check_input(x, weight, bias, channels_at=1)
    check_positive(stride=stride, dilation=dilation)
    _check_padding(padding)
    length = (x.shape[2] + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    if x.shape[2] < 1 or length < 1:
        raise ValueError(
            f"x must be as long as the filter, got {x.shape[2]} steps and padding {padding} for "
            f"{taps} taps of dilation {dilation}"
        )
    if len(residuals) > _MAX_RESIDUALS:
        raise ValueError(f"residuals must be at most {_MAX_RESIDUALS}, got {len(residuals)}")
    for residual in residuals:
        check_tensor("residuals", residual, like=("x", x), shape=(x.shape[0], out, length))


def _check_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *_: Any
) -> None:
    _out, taps = _check_input(x, weight, bias, channels_at=0)
    check_positive(stride=stride)
    _check_padding(padding)
    length = (x.shape[2] - 1) * stride + taps - 2 * padding
    if x.shape[2] < 1 or length < 1:
        raise ValueError(
            f"x must be longer than the padding, got {x.shape[2]} steps, stride {stride}, {taps} "
            f"taps and padding {padding}"
        )


def _check_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels_at: int
) -> tuple[int, int]:
    """Outputs and taps of the weight, whose dimension `channels_at` is x's channels."""
    check_tensor("weight", weight, ndim=3)
    if 0 in weight.shape:
        raise ValueError(f"weight must have outputs, inputs and taps, got {tuple(weight.shape)}")
    check_tensor("x", x, like=("weight", weight), ndim=3)
    sizes = list(weight.shape)
    sizes[channels_at] = x.shape[1]
    check_tensor("weight", weight, shape=tuple(sizes))
    out = weight.shape[1 - channels_at]
    if bias is not None:
        check_tensor("bias", bias, like=("weight", weight), shape=(out,))
    return out, weight.shape[2]


def _check_padding(padding: int) -> None:
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")


_conv1d = define(
    "conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor[] residuals, int stride, int padding, "
    "int dilation, float slope, float gain) -> Tensor",
    _reference,
    _check,
    stem="conv1d",
)
_conv_transpose1d = define(
    "conv_transpose1d(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, float slope)"
    " -> Tensor",
    _reference_transpose,
    _check_transpose,
    stem="conv1d",
)

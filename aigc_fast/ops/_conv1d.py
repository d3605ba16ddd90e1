"""The operators of convolutions along time: their references, and what they refuse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._checks import check_positive, check_tensor
from aigc_fast.ops._layout import channels_innermost
from aigc_fast.ops._registry import define

_MAX_RESIDUALS = 3


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """x itself where the slope is 1."""
    return F.leaky_relu(x, slope) if slope != 1 else x


def leaky_relu_backward(y: Tensor, gate: Tensor | None, slope: float) -> Tensor:
    """y times the derivative of leaky_relu(gate, slope)."""
    if gate is None or slope == 1:
        return y
    return torch.ops.aten.leaky_relu_backward(y, gate, slope, False)


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
    gate: Tensor | None = None,
    gate_slope: float = 1.0,
) -> Tensor:
    y = F.conv1d(leaky_relu(x, slope), weight, bias, stride, padding, dilation)
    for residual in residuals:
        y = y + residual
    return channels_innermost(leaky_relu_backward(y * gain if gain != 1 else y, gate, gate_slope))


def _reference_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
    output_padding: int = 0,
    dilation: int = 1,
    gate: Tensor | None = None,
    gate_slope: float = 1.0,
) -> Tensor:
    y = F.conv_transpose1d(
        leaky_relu(x, slope), weight, bias, stride, padding, output_padding, 1, dilation
    )
    return channels_innermost(leaky_relu_backward(y, gate, gate_slope))


def _reference_backward_weight(
    grad: Tensor,
    x: Tensor,
    taps: int,
    stride: int,
    padding: int,
    dilation: int,
    grad_slope: float,
    slope: float,
) -> Tensor:
    weight = x.new_empty(grad.shape[1], x.shape[1], taps)
    grad, x = leaky_relu(grad, grad_slope), leaky_relu(x, slope)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride], [padding], [dilation], False, [0], 1, (False, True, False)
    )[1].contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residuals: list[Tensor],
    stride: int,
    padding: int,
    dilation: int,
    slope: float,
    gain: float,
    gate: Tensor | None = None,
    gate_slope: float = 1.0,
) -> None:
    out, taps = _check_input(x, weight, bias, channels_at=1)
    _check_places(stride, padding, dilation, taps)
    length = (x.shape[2] + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    if x.shape[2] < 1 or length < 1:
        raise ValueError(
            f"x must be as long as the filter, got {x.shape[2]} steps and padding {padding} for "
            f"{taps} taps of dilation {dilation}"
        )
    if len(residuals) > _MAX_RESIDUALS:
        raise ValueError(f"residuals must be at most {_MAX_RESIDUALS}, got {len(residuals)}")
    for name, given in [*(("residuals", r) for r in residuals), ("gate", gate)]:
        if given is not None:
            check_tensor(name, given, like=("x", x), shape=(x.shape[0], out, length))


def _check_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    slope: float,
    output_padding: int = 0,
    dilation: int = 1,
    gate: Tensor | None = None,
    gate_slope: float = 1.0,
) -> None:
    out, taps = _check_input(x, weight, bias, channels_at=0)
    _check_places(stride, padding, dilation, taps)
    if not 0 <= output_padding < stride:
        raise ValueError(
            f"output_padding must be at least 0 and less than stride, {stride}, got "
            f"{output_padding}"
        )
    length = (x.shape[2] - 1) * stride + dilation * (taps - 1) + 1 - 2 * padding + output_padding
    if x.shape[2] < 1 or length < 1:
        raise ValueError(
            f"x must be longer than the padding, got {x.shape[2]} steps, stride {stride}, {taps} "
            f"taps and padding {padding}"
        )
    if gate is not None:
        check_tensor("gate", gate, like=("x", x), shape=(x.shape[0], out, length))


def _check_backward_weight(
    grad: Tensor, x: Tensor, taps: int, stride: int, padding: int, dilation: int, *_: Any
) -> None:
    check_tensor("x", x, ndim=3)
    check_tensor("grad", grad, like=("x", x), ndim=3)
    check_positive(taps=taps)
    _check_places(stride, padding, dilation, taps)
    length = (x.shape[2] + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    check_tensor("grad", grad, shape=(x.shape[0], grad.shape[1], length))


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


def _check_places(stride: int, padding: int, dilation: int, taps: int) -> None:
    """Sums of these must not overflow in a kernel."""
    reach = 2**30
    for name, value, least, end in (
        ("stride", stride, 1, 2**20),
        ("padding", padding, 0, reach),
        ("dilation", dilation, 1, reach // taps),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value >= end:
            of = f" for {taps} taps" if name == "dilation" else ""
            raise ValueError(f"{name} must be less than {end}{of}, got {value}")


conv1d_gated = define(
    "conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor[] residuals, int stride, int padding, "
    "int dilation, float slope, float gain, Tensor? gate=None, float gate_slope=1.0) -> Tensor",
    _reference,
    _check,
    stem="conv1d",
)
conv_transpose1d_gated = define(
    "conv_transpose1d(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, float slope, "
    "int output_padding=0, int dilation=1, Tensor? gate=None, float gate_slope=1.0) -> Tensor",
    _reference_transpose,
    _check_transpose,
    stem="conv1d",
)
conv1d_backward_weight = define(
    "conv1d_backward_weight(Tensor grad, Tensor x, int taps, int stride, int padding, "
    "int dilation, float grad_slope, float slope) -> Tensor",
    _reference_backward_weight,
    _check_backward_weight,
    stem="conv1d",
)

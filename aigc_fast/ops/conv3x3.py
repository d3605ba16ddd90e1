"""A 3x3 convolution with all that super-resolution networks have around it, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import channels_last
from aigc_fast.ops._registry import define


def conv3x3(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """y = residual + gain * prelu(conv(x, weight) + bias), with stride 1 and a border of zeros.

    x:        (batch, in, height, width), float64/32/16 or bfloat16, of any strides; or several
              tensors, read as if they were concatenated along the channels.
    weight:   (out, in, 3, 3), dtype of x.
    bias:     (out,), dtype of x, or None.
    slope:    (out,), dtype of x: factor on negative values; None leaves them.
    residual: (batch, out, height, width), dtype of x, or None.
    gain:     factor on the result before the residual is added.

    Returns (batch, out, height, width) in channels_last memory order. Computes in fp32 (fp64 for
    fp64) and rounds once. On CPUs with AMX, bfloat16 is multiplied in its tiles: sixteen times
    the products of AVX-512 in fp32. Bytes that must move: x, residual and y once.

    Inference only; `models.gan` takes a chain of torch's operations where a gradient is wanted.

    Raises TypeError or ValueError for a wrong dtype, shape or device; RuntimeError if a gradient is
    asked for.
    """
    xs = [x] if isinstance(x, Tensor) else list(x)
    tensors = (*xs, weight, bias, slope, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("conv3x3 has no derivative: call it under torch.no_grad()")
    return _conv3x3(xs, weight, bias, slope, residual, gain)


def _reference(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    gain: float,
) -> Tensor:
    y = F.conv2d(torch.cat(xs, 1) if len(xs) > 1 else xs[0], weight, bias, padding=1)
    if slope is not None:
        y = torch.where(y > 0, y, slope[:, None, None] * y)  # torch maps no prelu
    if gain != 1:
        y = y * gain
    if residual is not None:
        y = y + residual
    return channels_last(y)


def _check(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    *_: Any,
) -> None:
    if not xs:
        raise ValueError("x must be at least one tensor")
    check_tensor("weight", weight, ndim=4)
    for x in xs:
        check_tensor("x", x, like=("weight", weight), ndim=4)
        if x.shape[0] != xs[0].shape[0] or x.shape[2:] != xs[0].shape[2:]:
            raise ValueError(
                "x must be tensors of one batch, height and width, got "
                f"{[tuple(x.shape) for x in xs]}"
            )
    channels, (batch, _channels, *size) = sum(x.shape[1] for x in xs), xs[0].shape
    out = weight.shape[0]
    check_tensor("weight", weight, shape=(out, channels, 3, 3))
    if channels < 1 or out < 1 or min(size) < 1:
        raise ValueError(
            f"x must have channels, height and width, and weight outputs, got x {channels, *size} "
            f"and {out} outputs"
        )
    for name, p in (("bias", bias), ("slope", slope)):
        if p is not None:
            check_tensor(name, p, like=("weight", weight), shape=(out,))
    if residual is not None:
        check_tensor("residual", residual, like=("weight", weight), shape=(batch, out, *size))


_conv3x3 = define(
    "conv3x3(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? slope, Tensor? residual, float gain)"
    " -> Tensor",
    _reference,
    _check,
    stem="conv3x3",
)


def _reference_backward_input(grad: Tensor, weight: Tensor) -> Tensor:
    x = F.conv_transpose2d(grad, weight, padding=1)
    return channels_last(x)


def _check_backward_input(grad: Tensor, weight: Tensor) -> None:
    check_tensor("weight", weight, ndim=4)
    check_tensor("grad", grad, like=("weight", weight), ndim=4)
    check_tensor("weight", weight, shape=(grad.shape[1], weight.shape[1], 3, 3))


_conv3x3_backward_input = define(
    "conv3x3_backward_input(Tensor grad, Tensor weight) -> Tensor",
    _reference_backward_input,
    _check_backward_input,
    stem=None,
)


def _reference_backward_weight(grad: Tensor, x: Tensor) -> Tensor:
    weight = x.new_empty(grad.shape[1], x.shape[1], 3, 3)
    one = [1, 1]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, one, one, one, False, [0, 0], 1, (False, True, False)
    )[1].contiguous()


def _check_backward_weight(grad: Tensor, x: Tensor) -> None:
    check_tensor("x", x, ndim=4)
    batch, _channels, *size = x.shape
    check_tensor("grad", grad, like=("x", x), ndim=4)
    check_tensor("grad", grad, shape=(batch, grad.shape[1], *size))


_conv3x3_backward_weight = define(
    "conv3x3_backward_weight(Tensor grad, Tensor x) -> Tensor",
    _reference_backward_weight,
    _check_backward_weight,
    stem=None,
)

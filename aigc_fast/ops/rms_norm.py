"""RMSNorm, alone or with the addition of a residual before it."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

    x:      shape (..., width), float64/32/16 or bfloat16; y is contiguous. Rows that lie a fixed
            stride apart (a slice of a packed tensor) are read in place, other strides copied once.
    weight: shape (width,), dtype of x.
    eps:    added to the mean square.

    Computes in fp32 (fp64 for fp64). The reference rounds the normalised row to the dtype of x
    before the weight, as transformers' LlamaRMSNorm does; the kernels round once. The weight
    gradient is summed in fp32 over blocks of rows that the shape alone decides: same bits every
    time. Saves x for backward. Bytes that must move: forward 2, backward 3 times x.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.call(x, weight, eps)
    return _rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(normed, new_residual): new_residual = x + residual, normed = rms_norm(new_residual).

    residual: shape and dtype of x. The others, and the errors, are those of `rms_norm`.

    The norm reads new_residual as its dtype rounds it. Backward adds the gradients of both results
    in one pass, and is the gradient of x and of residual alike. Saves new_residual. Bytes that must
    move: forward 4, backward 4 times x.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or weight.requires_grad
    ):
        return _AddRMSNorm.call(x, residual, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    row = wide(x)
    normed = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).contiguous()


def _reference_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    new_residual = (x + residual).contiguous()
    return _reference(new_residual, weight, eps), new_residual


def _reference_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    row, dy = wide(x), wide(dy)
    factor = torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    normed, g = row * factor, dy * wide(weight)
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * factor
    if dsum is not None:
        dx = dx + wide(dsum)
    dweight = (dy * normed).sum_to_size(weight.shape) if weight_grad else dx.new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight.to(x.dtype).contiguous()


def _check(x: Tensor, weight: Tensor, *_: Any) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimension, got shape ()")
    check_tensor("weight", weight, like=("x", x), shape=x.shape[-1:])


def _check_add(x: Tensor, residual: Tensor, weight: Tensor, *_: Any) -> None:
    _check(x, weight)
    check_tensor("residual", residual, like=("x", x), shape=x.shape)


def _check_backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, *_: Any) -> None:
    _check(x, weight)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)
    if dsum is not None:
        check_tensor("grad_residual", dsum, like=("x", x), shape=x.shape)


_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _reference, _check, stem="rms_norm"
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _reference_add,
    _check_add,
    stem="rms_norm",
)
_backward = define(
    "rms_norm_backward(Tensor grad_output, Tensor? grad_residual, Tensor x, Tensor weight,"
    " float eps, bool weight_grad) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="rms_norm",
)


def _gradients(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    # The reference is made of differentiable operations: higher derivatives are torch's own.
    run = _reference_backward if torch.is_grad_enabled() else _backward
    dx, dweight = run(dy, dsum, x, weight, eps, weight_grad)
    return dx, dweight if weight_grad else None


class _RMSNorm(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return _rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        return *_gradients(dy, None, x, weight, ctx.eps, ctx.needs_input_grad[1]), None


class _AddRMSNorm(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple:
        normed, new_residual = _add_rms_norm(x, residual, weight, eps)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(new_residual, weight)
        return normed, new_residual

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple:
        if dy is None:
            return dsum, dsum, None, None
        new_residual, weight = ctx.saved_tensors
        dx, dweight = _gradients(dy, dsum, new_residual, weight, ctx.eps, ctx.needs_input_grad[2])
        return dx, dx, dweight, None

"""The loss of language models from hidden states: its logits are never all there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autocast import under_autocast
from aigc_fast.ops._autograd import OpFunction, transforming
from aigc_fast.ops._checks import check_choice, check_tensor
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops.cross_entropy import (
    REDUCTIONS,
    LossOptions,
    _backward_,
    _forward,
    _reduced,
    _reference,
    _scale,
)
from aigc_fast.ops.linear import linear

#: Rows at least whose logits are there at a time: products of fewer would leave a GPU idle.
_LEAST_ROWS = 2048


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, ...), computed for some rows
    of logits at a time. These, and then their gradient in the same place, take no more memory than
    linear_weight or than 2048 rows of logits, whichever is more.

    input:         (..., features), float64/32/16 or bfloat16: the last hidden states of a decoder.
    linear_weight: (classes, features), dtype of input; under autocast any floating dtype.
    target:        (...), int64, as for `cross_entropy`.
    linear_bias:   (classes,), dtype of linear_weight, or None.

    The other arguments, the result and the errors are those of `cross_entropy`; the names are those
    of torch.nn.functional.linear_cross_entropy. Logits have the dtype of input; gradients of weight
    and bias are summed in float32. For "mean" and "sum" the gradients are computed together with
    the loss, so that backward need not compute the logits again. For "none", and in float16, whose
    range needs the factor of a gradient scaler, backward does. Differentiable to any order; second
    derivatives hold all logits.

    Sources: Hsu et al. 2024 (Liger), arXiv:2410.10989; Wijmans et al. 2024, arXiv:2411.09009.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    options = LossOptions.of(ignore_index, label_smoothing, softcap, z_loss)
    device = input.device.type
    if under_autocast(device) and input.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _linear_cross_entropy(
                input, linear_weight, linear_bias, target, reduction, options
            )
    return _linear_cross_entropy(input, linear_weight, linear_bias, target, reduction, options)


def _linear_cross_entropy(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str,
    options: LossOptions,
) -> Tensor:  # fmt: skip
    _check_linear(input, weight, bias, target)
    shape, target = target.shape, target.reshape(-1)
    parameters = input.reshape(-1, input.shape[-1]), weight, bias
    scale = _scale(target, reduction, options.ignore_index, wide_dtype(input.dtype))
    needs = tuple(t is not None and t.requires_grad for t in parameters)
    if transforming():
        losses, _ = _forward(F.linear(*parameters), target, *options)
    elif not (torch.is_grad_enabled() and any(needs)):
        losses, _ = _in_chunks(*parameters, target, None, needs, options)
    elif scale is None or input.dtype == torch.float16:
        losses = _LinearCrossEntropy.call(*parameters, target, needs, options)
    else:
        return _ScaledLinearCrossEntropy.call(*parameters, target, scale, needs, options)
    return losses.view(shape) if scale is None else _reduced(losses, scale)


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    check_tensor("input", input)
    check_tensor("linear_weight", weight, like=("input", input), ndim=2)
    if input.dim() == 0 or input.shape[-1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            "input must be (..., features) and linear_weight (classes, features), got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("linear_bias", bias, like=("input", input), shape=weight.shape[:1])
    check_tensor("target", target, dtypes=(torch.int64,), shape=input.shape[:-1])


def _in_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, grad_losses: Tensor | None,
    needs: tuple[bool, ...], options: LossOptions,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """(losses, gradients of x, weight and bias for which needs asks), those of the parameters in
    the dtype in which they add up; without grad_losses, the losses' gradients, none."""
    rows = max(weight.shape[1], _LEAST_ROWS)
    losses, grad_x = [], torch.empty_like(x) if needs[0] and grad_losses is not None else None
    grad_weight = grad_bias = None
    for start in range(0, max(len(x), 1), rows):
        part = slice(start, start + rows)
        logits = linear(x[part], weight, bias)
        loss, lse = _forward(logits, target[part], *options)
        losses.append(loss)
        if grad_losses is None:
            continue
        _backward_(grad_losses[part], logits, target[part], lse, *options)
        if grad_x is not None:
            grad_x[part] = linear(logits, weight.t())
        if needs[1]:
            grad_weight = _added(grad_weight, linear(logits.t(), x[part].t()))
        if needs[2]:
            grad_bias = _added(grad_bias, logits.sum(0, dtype=wide_dtype(x.dtype)))
    return torch.cat(losses), [grad_x, grad_weight, grad_bias]


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.to(wide_dtype(part.dtype)).add_(part)


def _second(ctx: Any, grad_losses: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight and bias, to be differentiated again: torch's own."""
    target = ctx.saved_tensors[3]
    with torch.enable_grad():
        # Views: where one of them came from another, the way there is not theirs to go.
        parameters: Any = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:3]]
        losses, _ = _reference(F.linear(*parameters), target, *ctx.options)
        wanted = [t for t, need in zip(parameters, ctx.needs, strict=True) if need]
        found = iter(torch.autograd.grad(losses, wanted, grad_losses, create_graph=True))
    return [next(found) if need else None for need in ctx.needs]


class _LinearCrossEntropy(OpFunction):
    """(rows,) losses; backward computes the logits anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        needs: tuple[bool, ...], options: LossOptions,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, target)
        ctx.needs, ctx.options = needs, options
        return _in_chunks(x, weight, bias, target, None, needs, options)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            return *_second(ctx, grads[0]), *[None] * 3
        x, weight, bias, target = ctx.saved_tensors
        _, found = _in_chunks(x, weight, bias, target, grads[0], ctx.needs, ctx.options)
        return *(None if g is None else g.to(x.dtype) for g in found), *[None] * 3


class _ScaledLinearCrossEntropy(OpFunction):
    """scale * the sum of the losses; forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor,
        needs: tuple[bool, ...], options: LossOptions,
    ) -> Tensor:  # fmt: skip
        ctx.needs, ctx.options = needs, options
        losses, grads = _in_chunks(x, weight, bias, target, scale.expand(len(x)), needs, options)
        ctx.save_for_backward(x, weight, bias, target, scale, *grads)
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, _, _, target, scale, *found) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_second(ctx, (grad * scale).expand(len(target))), *[None] * 4
        # New tensors, for the next backward needs these.
        return *(None if g is None else (g * grad).to(x.dtype) for g in found), *[None] * 4

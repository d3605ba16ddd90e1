"""The loss of language models, and its gradient."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import can_look, check_choice, check_device, check_tensor
from aigc_fast.ops._layout import wide, wide_dtype
from aigc_fast.ops._registry import define

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The cross-entropy of softmax(input) with the classes in target, in float32 (float64 for
    float64), whatever the dtype of input:

        x    = softcap * tanh(input / softcap), or input
        lse  = log(sum_v exp(x_v))
        loss = (1 - label_smoothing) * (lse - x_target) + label_smoothing * (lse - mean_v(x))
               + z_loss * lse^2

    input:           (..., classes), the logits, float64/32/16 or bfloat16; unlike torch's function
                     it takes the classes in the last dimension.
    target:          (...), int64 in [0, classes) or ignore_index.
    reduction:       "mean" over the targets that are not ignored (NaN if all are), "sum", or "none"
                     for (...) losses.
    ignore_index:    the target of a row that counts for nothing; its gradient is zero.
    label_smoothing: in [0, 1].
    softcap:         positive, or None.
    z_loss:          weight of lse^2, which keeps softmax's denominator near one.

    Differentiable to any order; the first gradient is a kernel. Bytes that must move: the
    logits once, in backward the logits and their gradient; PyTorch under a 16-bit dtype moves six
    times that, with copies in float32.

    Raises TypeError or ValueError for a wrong dtype, shape, device or option, and for a target out
    of range; on a GPU, where a look at it would wait for the device, that row's loss is NaN.

    Sources: label smoothing, Szegedy et al. 2015, arXiv:1512.00567; z-loss, Chowdhery et al. 2022,
    arXiv:2204.02311; softcap, Gemma 2, arXiv:2408.00118.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    options = LossOptions.of(ignore_index, label_smoothing, softcap, z_loss)
    if torch.is_grad_enabled() and input.requires_grad:
        losses = _CrossEntropy.call(input, target, options)
    else:
        losses, _ = _forward(input, target, *options)
    return _reduced(losses, _scale(target, reduction, ignore_index, losses.dtype))


class LossOptions(NamedTuple):
    """What the operators are told besides tensors, in the order in which they take it."""

    ignore_index: int
    label_smoothing: float
    softcap: float  # 0 for none
    z_loss: float

    @classmethod
    def of(
        cls, ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float
    ) -> "LossOptions":
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
        return cls(ignore_index, label_smoothing, softcap or 0.0, z_loss)


def _scale(target: Tensor, reduction: str, ignore_index: int, dtype: torch.dtype) -> Tensor | None:
    """What the sum of the losses is multiplied by; None if they are not added."""
    if reduction == "none":
        return None
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=target.device)
    return (target != ignore_index).sum().to(dtype).reciprocal()


def _reduced(losses: Tensor, scale: Tensor | None) -> Tensor:
    return losses if scale is None else losses.sum() * scale


def _logits(x: Tensor, softcap: float) -> Tensor:
    x = wide(x)
    return torch.tanh(x / softcap) * softcap if softcap else x


def _reference(
    x: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits, kept = _logits(x, softcap), target != ignore_index
    lse = logits.logsumexp(-1)
    chosen = logits.gather(-1, torch.where(kept, target, 0).unsqueeze(-1)).squeeze(-1)
    losses = lse - chosen
    if smoothing:
        losses = losses + smoothing * (chosen - logits.mean(-1))
    if z_loss:
        losses = losses + z_loss * lse.square()
    return torch.where(kept, losses, 0), lse


def _reference_backward(
    grad_losses: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int,
    smoothing: float, softcap: float, z_loss: float,
) -> Tensor:  # fmt: skip
    logits, kept = _logits(x, softcap), (target != ignore_index).unsqueeze(-1)
    lse, grad_losses = lse.unsqueeze(-1), grad_losses.unsqueeze(-1)
    chosen = torch.where(kept, target.unsqueeze(-1), 0)
    grad = torch.exp(logits - lse) * (1 + 2 * z_loss * lse) - smoothing / x.shape[-1]
    grad = grad.scatter_add(-1, chosen, grad.new_full(chosen.shape, smoothing - 1))
    if softcap:
        grad = grad * (1 - (logits / softcap).square())
    return torch.where(kept, grad * grad_losses, 0).to(x.dtype)


def _reference_backward_(grad_losses: Tensor, x: Tensor, *args: Any) -> None:
    x.copy_(_reference_backward(grad_losses, x, *args))


def _check(
    input: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float,
    z_loss: float,
) -> None:  # fmt: skip
    check_tensor("input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    check_tensor("target", target, dtypes=(torch.int64,), shape=input.shape[:-1])
    check_device("target", target, ("input", input))
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {smoothing}")
    for name, value in (("softcap", softcap), ("z_loss", z_loss)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if can_look(target):
        classes = input.shape[-1]
        wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            raise ValueError(
                f"target must be in [0, {classes}) or ignore_index ({ignore_index}), "
                f"got {target[wrong][0].item()}"
            )


def _check_backward(
    grad_losses: Tensor, input: Tensor, target: Tensor, lse: Tensor, *options: Any
) -> None:
    _check(input, target, *options)
    for name, value in (("grad_losses", grad_losses), ("lse", lse)):
        check_tensor(name, value, dtypes=(wide_dtype(input.dtype),), shape=target.shape)


def _check_backward_(grad_losses: Tensor, input: Tensor, *args: Any) -> None:
    _check_backward(grad_losses, input, *args)
    if not input.is_contiguous():
        raise ValueError("input must be contiguous")


_OPTIONS = "int ignore_index, float label_smoothing, float softcap, float z_loss"
_forward = define(
    f"cross_entropy(Tensor input, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="cross_entropy",
)
_backward = define(
    "cross_entropy_backward(Tensor grad_losses, Tensor input, Tensor target, Tensor lse,"
    f" {_OPTIONS}) -> Tensor",
    _reference_backward,
    _check_backward,
    stem="cross_entropy",
)
_backward_ = define(
    "cross_entropy_backward_(Tensor grad_losses, Tensor(a!) input, Tensor target, Tensor lse,"
    f" {_OPTIONS}) -> ()",
    _reference_backward_,
    _check_backward_,
    stem="cross_entropy",
)


class _CrossEntropy(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, options: LossOptions) -> Tensor:
        losses, lse = _forward(x, target, *options)
        ctx.save_for_backward(x, target, lse)
        ctx.options = options
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, target, lse) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is torch's own, and lse a function of x.
            lse = _logits(x, ctx.options.softcap).logsumexp(-1)
            grad = _reference_backward(grad, x, target, lse, *ctx.options)
        else:
            grad = _backward(grad, x, target, lse, *ctx.options)
        return grad, None, None

"""The loss of diffusion training: the target, the error and its weight in one pass."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor, name_of
from aigc_fast.ops._layout import strided_as, wide_dtype
from aigc_fast.ops._registry import define

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
_SYNONYMS = {"v": "v_prediction", "flow": "flow_prediction"}


def diffusion_loss(
    model_output: Tensor,
    sample: Tensor,
    noise: Tensor,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    prediction_type: str = "epsilon",
) -> Tensor:
    """mean over the batch of weight * mean((model_output - target)^2), a scalar in float32 (float64
    for float64). The target is never written:

    =============== ================================
    prediction_type target
    =============== ================================
    epsilon         noise
    sample          sample
    v_prediction    alpha * noise - sigma * sample
    flow_prediction noise - sample
    =============== ================================

    "v" and "flow" are the same as v_prediction and flow_prediction.

    model_output: (batch, ...), float64/32/16 or bfloat16, what the model made of `add_noise`'s
                  result.
    sample, noise: its shape, and its dtype or float32: under autocast the output alone is narrow.
    alpha, sigma: (batch,), any floating dtype; v_prediction needs them.
    weights:      (batch,), any floating dtype, such as functions of the signal-to-noise ratio
                  (alpha / sigma)^2; None for 1.

    Computes in fp32 (fp64 for fp64). Differentiable to any order with respect to all tensors: the
    first gradient of model_output is one pass, every other one is torch's. Bytes that must move:
    model_output and what the target is made of once, in backward the gradient too.

    Raises TypeError or ValueError for a wrong dtype, shape, device or prediction_type, and for an
    empty model_output.

    Sources: Ho et al. 2020, arXiv:2006.11239; v: Salimans & Ho 2022, arXiv:2202.00512; flow: Liu et
    al. 2022, arXiv:2209.03003; weights: Hang et al. 2023, arXiv:2303.09556.
    """
    kind = _SYNONYMS.get(prediction_type, prediction_type)
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )
    if kind != "v_prediction":
        alpha = sigma = None
    elif alpha is None or sigma is None:
        raise ValueError("alpha and sigma must be given for v_prediction")
    first, second = (sample if kind == "sample" else noise), None
    if kind in ("v_prediction", "flow_prediction"):
        second = sample
        if second is None:  # for the operator it stands for zeros
            raise TypeError("sample must be a torch.Tensor, got None")
    args = model_output, first, second, alpha, sigma, weights
    if not torch.is_grad_enabled():
        return _loss(*args)
    if any(x is not None and x.requires_grad for x in args[1:]):
        _check(*args)
        return _reference(*args)
    return _DiffusionLoss.call(*args) if model_output.requires_grad else _loss(*args)


def _error(
    model_output: Tensor, first: Tensor, second: Tensor | None, alpha: Tensor | None,
    sigma: Tensor | None,
) -> Tensor:  # fmt: skip
    """model_output - target, the target being alpha * first - sigma * second, where no second
    stands for zeros, and no alpha and sigma for ones."""
    dtype = wide_dtype(model_output.dtype)
    target = first.to(dtype)
    if second is not None:
        other = second.to(dtype)
        if alpha is not None and sigma is not None:
            target, other = _each(alpha, target) * target, _each(sigma, target) * other
        target = target - other
    return model_output.to(dtype) - target


def _each(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _reference(model_output: Tensor, *args: Any) -> Tensor:
    *target, weights = args
    error = _error(model_output, *target)
    square = error.square().reshape(error.shape[0], -1).mean(1)
    return (square if weights is None else weights.to(square.dtype) * square).mean()


def _reference_backward(grad_output: Tensor, model_output: Tensor, *args: Any) -> Tensor:
    *target, weights = args
    error = _error(model_output, *target)
    scale = grad_output.to(error.dtype) * (2 / error.numel())
    if weights is not None:
        scale = scale * _each(weights, error)
    return strided_as(error * scale, model_output)


def _check(
    model_output: Tensor, first: Tensor, second: Tensor | None, alpha: Tensor | None,
    sigma: Tensor | None, weights: Tensor | None,
) -> None:  # fmt: skip
    check_tensor("model_output", model_output)
    if model_output.dim() == 0 or model_output.numel() == 0:
        shape = tuple(model_output.shape)
        raise ValueError(f"model_output must be a batch and not empty, got shape {shape}")
    parts = {"noise": first, "sample": second} if second is not None else {"sample or noise": first}
    dtypes = (model_output.dtype, wide_dtype(model_output.dtype))
    for name, part in parts.items():
        check_tensor(name, part, shape=model_output.shape)
        if part.dtype not in dtypes or part.dtype != first.dtype:
            raise TypeError(
                "sample and noise must have one dtype, that of model_output "
                f"({name_of(model_output.dtype)}) or float32, got {name_of(part.dtype)}"
            )
    scales = {"alpha": alpha, "sigma": sigma, "weights": weights}
    for name, scale in scales.items():
        if scale is not None:
            check_tensor(name, scale, shape=model_output.shape[:1])
    for name, x in (parts | scales).items():
        check_device(name, x, ("model_output", model_output))


def _check_backward(grad_output: Tensor, *args: Any) -> None:
    _check(*args)
    if grad_output.numel() != 1:
        raise ValueError(f"grad_output must be a scalar, got shape {tuple(grad_output.shape)}")


_ARGUMENTS = (
    "Tensor model_output, Tensor first, Tensor? second, Tensor? alpha, Tensor? sigma,"
    " Tensor? weights"
)
_loss = define(f"diffusion_loss({_ARGUMENTS}) -> Tensor", _reference, _check, stem="diffusion_loss")
_backward = define(
    f"diffusion_loss_backward(Tensor grad_output, {_ARGUMENTS}) -> Tensor",
    _reference_backward,
    _check_backward,
    stem="diffusion_loss",
)


class _DiffusionLoss(OpFunction):
    @staticmethod
    def forward(ctx: Any, *args: Tensor | None) -> Tensor:
        ctx.save_for_backward(*args)
        return _loss(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # A gradient of this gradient is torch's own, through the reference.
        run = _reference_backward if torch.is_grad_enabled() else _backward
        return run(grad, *ctx.saved_tensors), None, None, None, None, None

"""The operator behind every norm of norm_act.py, its derivative and the derivative of that."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops import _norm_reference as reference
from aigc_fast.ops._activations import DEFAULT_ALPHA
from aigc_fast.ops._autograd import OpFunction, transforming
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._norm_reference import GIVEN, PIXEL, SAMPLE
from aigc_fast.ops._registry import FLOATS, define


def norm_act(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, options: tuple,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, var), y differentiable; options: (statistics, eps, act, gain, alpha)."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _NormAct.call(x, mean, var, weight, bias, options)
    return _norm_act(x, mean, var, weight, bias, *options)


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    act: int = 0, gain: float = 1.0, alpha: float = DEFAULT_ALPHA,
) -> Tensor:  # fmt: skip
    """y for a mean and var that may have gradients, which `norm_act` gives none.

    The kernels take them as constants, m and v. By how much they differ from those, which is zero
    but for derivatives, goes to weight and bias:
        (x - mean) / sqrt(var + eps) weight = (x - m) / sqrt(v + eps) weight' + (m - mean) scale
        with scale = weight / sqrt(var + eps), weight' = scale sqrt(v + eps).
    """
    m, v = mean.detach(), var.detach()
    if transforming() or (torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad)):
        scale = torch.rsqrt(var + eps)
        scale = scale if weight is None else scale * weight
        shift = (m - mean) * scale
        weight = scale * torch.sqrt(v + eps)
        bias = shift if bias is None else bias + shift
    return norm_act(x, m, v, weight, bias, (GIVEN, eps, act, gain, alpha))[0]


def _norms(x: Tensor, statistics: int) -> int:
    if statistics == PIXEL:
        return x.numel() // max(x.shape[1], 1)
    return x.shape[0] * x.shape[1] if statistics == SAMPLE else x.shape[1]


def check_parameters(x: Tensor, norms: int, **parameters: Tensor | None) -> None:
    """Refuses an x without channels, and parameters that are not one value a norm."""
    check_tensor("x", x, min_ndim=2)
    for name, value in parameters.items():
        if value is not None:
            check_tensor(name, value, dtypes=FLOATS, shape=(norms,))
            check_device(name, value, ("x", x))


def _check(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, statistics: int, *_: Any,
) -> None:  # fmt: skip
    norms = _norms(x, statistics) if x.dim() > 1 else 0
    running = {"running_mean": mean, "running_var": var}
    check_parameters(x, norms, **running, weight=weight, bias=bias)
    for name, value in running.items():
        if statistics == GIVEN and value is None:
            raise ValueError(f"{name} must be given in evaluation (training=False), got None")
    needed = {GIVEN: 0, PIXEL: 1}.get(statistics, 2)
    if norms and x.numel() < needed * norms:
        raise ValueError(
            f"x must have at least {needed} values for each mean, got shape {tuple(x.shape)}"
        )


def _check_backward(dy: Tensor, x: Tensor, *options: Any) -> None:
    _check(x, *options)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


def _check_double_backward(
    gg: Tensor, gg_weight: Tensor | None, gg_bias: Tensor | None, dy: Tensor, x: Tensor,
    mean: Tensor | None, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    statistics: int, *_: Any,
) -> None:  # fmt: skip
    _check_backward(dy, x, mean, var, weight, bias, statistics)
    check_tensor("grad_grad", gg, like=("x", x), shape=x.shape)
    for name, value in {"grad_grad_weight": gg_weight, "grad_grad_bias": gg_bias}.items():
        if value is not None:
            check_tensor(name, value, dtypes=FLOATS, shape=(_norms(x, statistics),))


_OPTIONS = "int statistics, float eps, int act, float gain, float alpha"
_norm_act = define(
    "norm_act(Tensor x, Tensor? running_mean, Tensor? running_var, Tensor? weight,"
    f" Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference.forward,
    _check,
    stem="norm_act",
)
_backward = define(
    "norm_act_backward(Tensor grad_output, Tensor x, Tensor? mean, Tensor var,"
    f" Tensor? weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference.backward,
    _check_backward,
    stem="norm_act",
)
_double_backward = define(
    "norm_act_double_backward(Tensor grad_grad, Tensor? grad_grad_weight,"
    " Tensor? grad_grad_bias, Tensor grad_output, Tensor x, Tensor? mean, Tensor var,"
    f" Tensor? weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.double_backward,
    _check_double_backward,
    stem="norm_act_double_backward",
)


class _NormAct(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, options: tuple,
    ) -> tuple:  # fmt: skip
        y, mean, var = _norm_act(x, running_mean, running_var, weight, bias, *options)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        statistics = options[0]
        if statistics == GIVEN:
            ctx.save_for_backward(x, running_mean, running_var, weight, bias)
        else:
            ctx.save_for_backward(x, None if statistics == PIXEL else mean, var, weight, bias)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
        if dy is None:
            return (None,) * 6
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dweight, dbias = _NormActBackward.call(dy, *saved, ctx.options)
        else:
            dx, dweight, dbias = _backward(dy, *saved, *ctx.options)
        weight, bias = saved[3:]
        dweight, dbias = None if weight is None else dweight, None if bias is None else dbias
        return dx, None, None, dweight, dbias, None


class _NormActBackward(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, mean: Tensor | None, var: Tensor,
        weight: Tensor | None, bias: Tensor | None, options: tuple,
    ) -> tuple:  # fmt: skip
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, mean, var, weight, bias)
        return _backward(dy, x, mean, var, weight, bias, *options)

    @staticmethod
    def backward(
        ctx: Any, gg: Tensor | None, gg_weight: Tensor | None, gg_bias: Tensor | None
    ) -> tuple:
        dy, x, mean, var, weight, bias = ctx.saved_tensors
        gg_weight = None if weight is None else gg_weight
        gg_bias = None if bias is None else gg_bias
        if gg is None:
            if gg_weight is None and gg_bias is None:
                return (None,) * 7
            gg = torch.zeros_like(x)
        # A third derivative is torch's own, through the reference.
        run: Any = reference.double_backward if torch.is_grad_enabled() else _double_backward
        grad_dy, grad_x, grad_weight, grad_bias = run(
            gg, gg_weight, gg_bias, dy, x, mean, var, weight, bias, *ctx.options
        )
        grad_weight = None if weight is None else grad_weight
        return grad_dy, grad_x, None, None, grad_weight, None if bias is None else grad_bias, None

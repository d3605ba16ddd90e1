"""Bias, activation, gain and clamp in one pass, differentiable to any order."""

import math
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._activations import (
    DEFAULT_ALPHA,
    activate,
    curvature,
    resolve,
    slope,
)
from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import strided_as
from aigc_fast.ops._registry import define


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = clip(gain * act(x + bias), -clamp, clamp).

    x:     any shape, float64/32/16 or bfloat16. Its memory order (contiguous, channels_last, any
           permutation) is that of y; a tensor with gaps is copied once.
    bias:  shape (x.shape[dim],), dtype of x, or None.
    dim:   the dimension of x that bias runs along; negative counts from the end.
    act:   linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish; none, leaky_relu and
           silu are other names of linear, lrelu and swish.
    alpha: slope of lrelu for x < 0 (0.2) or scale of elu (1.0); no other activation takes it.
    gain:  factor on the activation; None is sqrt(2) for relu, lrelu and swish, 1 for the others.
    clamp: limit on |y|, at least 0, or None.

    Computes in fp32 (fp64 for fp64) and rounds once. NaN stays NaN. The derivative at |y| = clamp
    and that of relu and lrelu at 0 are those for x beyond and below. Saves one tensor for backward:
    y where its sign tells the slope (linear, relu, lrelu), else x. Bytes that must move:
    forward 2, backward 3, double backward 3 (5 for the smooth activations) times x.

    Raises TypeError or ValueError for a wrong dtype, shape, device, dim, act, alpha or clamp.

    Source: the operation of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958) and its defaults.
    """
    number, alpha, default_gain, from_sign = resolve(act, alpha, clamp)
    if gain is None:
        gain = default_gain
    if dim < 0:
        dim += x.dim()
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        # y has the sign of x only for a positive gain and a slope that is not negative.
        from_output = from_sign and gain > 0 and alpha >= 0
        return _BiasAct.call(x, bias, (number, dim, gain, clamp, alpha, from_output))
    if clamp is None and alpha == DEFAULT_ALPHA:
        return _bias_act(x, bias, number, dim, gain)
    return _bias_act(x, bias, number, dim, gain, clamp, alpha)


def _reference(
    x: Tensor, bias: Tensor | None, act: int, dim: int = 1, gain: float = 1.0,
    clamp: float | None = None, alpha: float = DEFAULT_ALPHA,
) -> Tensor:  # fmt: skip
    if bias is not None:
        x = x + _over_channels(bias, x, dim)
    y = activate(x, act, alpha)
    if gain != 1:
        y = y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def _limit(clamp: float | None) -> float:
    return math.inf if clamp is None else clamp


def _over_channels(bias: Tensor, x: Tensor, dim: int) -> Tensor:
    return bias.reshape([-1 if i == dim else 1 for i in range(x.dim())])


def _bias_grad(dx: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    if bias is None:
        return dx.new_empty(0)
    return dx.sum([i for i in range(dx.dim()) if i != dim]) if dx.dim() > 1 else dx.clone()


def _reference_backward(
    dy: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    act: int,
    dim: int,
    gain: float,
    clamp: float | None,
    alpha: float,
    from_output: bool,
) -> tuple[Tensor, Tensor]:
    if from_output:
        inside = saved.abs() < torch.tensor(_limit(clamp), dtype=saved.dtype)
        dx = dy * slope(saved, act, alpha) * gain * inside
    else:
        x = saved if bias is None else saved + _over_channels(bias, saved, dim)
        inside = (activate(x, act, alpha) * gain).abs() <= _limit(clamp)
        dx = dy * slope(x, act, alpha) * gain * inside
    dx = strided_as(dx, saved)
    return dx, _bias_grad(dx, bias, dim)


def _reference_double_backward(
    gg: Tensor,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    act: int,
    dim: int,
    gain: float,
    clamp: float | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    at = x if bias is None else x + _over_channels(bias, x, dim)
    inside = (activate(at, act, alpha) * gain).abs() <= _limit(clamp)
    grad_dy = gg * slope(at, act, alpha) * gain * inside
    grad_x = gg * dy * curvature(at, act, alpha) * gain * inside
    return grad_dy, grad_x, _bias_grad(grad_x, bias, dim)


def _check(x: Tensor, bias: Tensor | None, act: int, dim: int = 1, *_: Any) -> None:
    check_tensor("x", x)
    if bias is None:
        return
    if not 0 <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x (shape {tuple(x.shape)}), got {dim}")
    check_tensor("bias", bias, like=("x", x), shape=(x.shape[dim],))


def _check_backward(dy: Tensor, saved: Tensor, bias: Tensor | None, *options: Any) -> None:
    _check(saved, bias, *options)
    check_tensor("grad_output", dy, like=("x", saved), shape=saved.shape)


def _check_double_backward(
    gg: Tensor, dy: Tensor, x: Tensor, bias: Tensor | None, *options: Any
) -> None:
    _check_backward(dy, x, bias, *options)
    check_tensor("grad_grad", gg, like=("x", x), shape=x.shape)


_bias_act = define(
    # A scalar costs 0.3 us to hand over, one left at its default nothing.
    "bias_act(Tensor x, Tensor? bias, int act, int dim=1, float gain=1.0, float? clamp=None,"
    f" float alpha={DEFAULT_ALPHA}) -> Tensor",
    _reference,
    _check,
    stem="bias_act",
)
_backward = define(
    "bias_act_backward(Tensor grad_output, Tensor saved, Tensor? bias, int act,"
    " int dim, float gain, float? clamp, float alpha, bool from_output) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="bias_act",
)
_double_backward = define(
    "bias_act_double_backward(Tensor grad_grad, Tensor grad_output, Tensor x, Tensor? bias,"
    " int act, int dim, float gain, float? clamp, float alpha) -> (Tensor, Tensor, Tensor)",
    _reference_double_backward,
    _check_double_backward,
    stem="bias_act",
)


def bias_act_gradients(
    dy: Tensor | None, saved: Tensor, bias: Tensor | None, options: tuple
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and bias, differentiable where gradients are enabled.

    options: (act, dim, gain, clamp, alpha, from_output); `saved` is y where from_output, else x.
    dy:      None for a gradient that is zero, as a gradient penalty has of the activations in a
             piecewise linear network. Then that of x is None too, and the layers before do nothing;
             zeros in its place would go through each of their convolutions.
    """
    if dy is None:
        return None, None if bias is None else torch.zeros_like(bias)
    if torch.is_grad_enabled():
        dx, dbias = _BiasActBackward.call(dy, saved, bias, options)
    else:
        dx, dbias = _backward(dy, saved, bias, *options)
    return dx, None if bias is None else dbias


class _BiasAct(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        y = _bias_act(x, bias, *options[:5])
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y if options[-1] else x, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        saved, bias = ctx.saved_tensors
        return *bias_act_gradients(dy, saved, bias, ctx.options), None


class _BiasActBackward(OpFunction):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, saved: Tensor, bias: Tensor | None, options: tuple) -> tuple:
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, saved, bias)
        return _backward(dy, saved, bias, *options)

    @staticmethod
    def backward(ctx: Any, gg: Tensor | None, gg_bias: Tensor | None) -> tuple:
        dy, saved, bias = ctx.saved_tensors
        options = ctx.options
        if bias is not None and gg_bias is not None:
            # dbias is dx summed: what arrives for it arrives for each of its terms.
            spread = _over_channels(gg_bias, saved, options[1])
            gg = spread.expand_as(saved) if gg is None else gg + spread
        if gg is None:
            return None, None, None, None
        if options[-1]:  # piecewise linear: the derivative does not depend on x
            if torch.is_grad_enabled():
                return _BiasActBackward.call(gg, saved, None, options)[0], None, None, None
            return _backward(gg, saved, None, *options)[0], None, None, None
        # A third derivative is torch's own, through the reference.
        run = _reference_double_backward if torch.is_grad_enabled() else _double_backward
        grad_dy, grad_x, grad_bias = run(gg, dy, saved, bias, *options[:-1])
        return grad_dy, grad_x, None if bias is None else grad_bias, None

"""Bias, activation, gain and clamp in one pass, differentiable as often as one likes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import Op

#: activation: (number in the schema, default alpha, default gain, sign of y tells the slope)
ACTIVATIONS = {
    "linear": (0, 0.0, 1.0, True),
    "relu": (1, 0.0, math.sqrt(2), True),
    "lrelu": (2, 0.2, math.sqrt(2), True),
    "tanh": (3, 0.0, 1.0, False),
    "sigmoid": (4, 0.0, 1.0, False),
    "elu": (5, 1.0, 1.0, False),
    "selu": (6, 0.0, 1.0, False),
    "softplus": (7, 0.0, 1.0, False),
    "swish": (8, 0.0, math.sqrt(2), False),
}


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
    act:   linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
    alpha: slope of lrelu for x < 0 (0.2) or scale of elu (1.0); no other activation takes it.
    gain:  factor on the activation; None is sqrt(2) for relu, lrelu and swish, 1 for the others.
    clamp: limit on |y|, or None.

    Computes in fp32 (fp64 for fp64) and rounds once. NaN stays NaN. The derivative at |y| = clamp
    and that of relu and lrelu at 0 are those for x beyond and below. Saves one tensor for backward:
    y where its sign tells the slope (linear, relu, lrelu), else x. Bytes that must move:
    forward 2, backward 3, double backward 3 (5 for the smooth activations) times x.

    Raises TypeError or ValueError for a wrong dtype, shape, device, dim, act or alpha.

    Source: the operation of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958) and its defaults.
    """
    known = ACTIVATIONS.get(act)
    if known is None:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    number, default_alpha, default_gain, from_sign = known
    if alpha is None:
        alpha = default_alpha
    elif default_alpha == 0:
        raise ValueError(f"alpha must be None for act={act!r}, got {alpha}")
    if gain is None:
        gain = default_gain
    if clamp is None:
        clamp = math.inf
    if dim < 0:
        dim += x.dim()
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        # y has the sign of x only for a positive gain and a slope that is not negative.
        from_output = from_sign and gain > 0 and alpha >= 0
        return _BiasAct.apply(x, bias, (dim, number, alpha, gain, clamp, from_output))
    return _bias_act(x, bias, dim, number, alpha, gain, clamp)


def _reference(
    x: Tensor, bias: Tensor | None, dim: int, act: int, alpha: float, gain: float, clamp: float
) -> Tensor:
    if bias is not None:
        x = x + _over_channels(bias, x, dim)
    y = _activate(x, act, alpha)
    if gain != 1:
        y = y * gain
    return y if clamp == math.inf else y.clamp(-clamp, clamp)


def _activate(x: Tensor, act: int, alpha: float) -> Tensor:
    match list(ACTIVATIONS)[act]:
        case "linear":
            return x.clone()
        case "relu":
            return F.relu(x)
        case "lrelu":
            return F.leaky_relu(x, alpha)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "elu":
            return F.elu(x, alpha)
        case "selu":
            return F.selu(x)
        case "softplus":
            return F.softplus(x)
        case _:
            return F.silu(x)


def _slope(x: Tensor, act: int, alpha: float) -> Tensor:
    """d act / dx"""
    match list(ACTIVATIONS)[act]:
        case "linear":
            return torch.ones_like(x)
        case "relu" | "lrelu":
            return torch.where(x > 0, 1.0, alpha).to(x.dtype)
        case "tanh":
            return 1 - torch.tanh(x) ** 2
        case "sigmoid":
            return torch.sigmoid(x) * torch.sigmoid(-x)
        case "elu":
            return torch.where(x > 0, 1.0, alpha * torch.exp(x.clamp(max=0)))
        case "selu":
            return _SELU_SCALE * torch.where(x > 0, 1.0, _SELU_ALPHA * torch.exp(x.clamp(max=0)))
        case "softplus":
            return torch.sigmoid(x)
        case _:
            s = torch.sigmoid(x)
            return s * (1 + x * (1 - s))


def _curvature(x: Tensor, act: int, alpha: float) -> Tensor:
    """d^2 act / dx^2"""
    match list(ACTIVATIONS)[act]:
        case "tanh":
            y = torch.tanh(x)
            return -2 * y * (1 - y * y)
        case "sigmoid":
            s = torch.sigmoid(x)
            return s * (1 - s) * (1 - 2 * s)
        case "elu":
            return torch.where(x > 0, 0.0, alpha * torch.exp(x.clamp(max=0)))
        case "selu":
            scale = _SELU_SCALE * _SELU_ALPHA
            return torch.where(x > 0, 0.0, scale * torch.exp(x.clamp(max=0)))
        case "softplus":
            return torch.sigmoid(x) * torch.sigmoid(-x)
        case "swish":
            s = torch.sigmoid(x)
            return s * (1 - s) * (2 + x * (1 - 2 * s))
        case _:
            return torch.zeros_like(x)


_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


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
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
    from_output: bool,
) -> tuple[Tensor, Tensor]:
    if from_output:
        inside = saved.abs() < torch.tensor(clamp, dtype=saved.dtype)
        dx = dy * _slope(saved, act, alpha) * gain * inside
    else:
        x = saved if bias is None else saved + _over_channels(bias, saved, dim)
        inside = (_activate(x, act, alpha) * gain).abs() <= clamp
        dx = dy * _slope(x, act, alpha) * gain * inside
    dx = torch.empty_like(saved).copy_(dx)
    return dx, _bias_grad(dx, bias, dim)


def _reference_double_backward(
    gg: Tensor,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    at = x if bias is None else x + _over_channels(bias, x, dim)
    inside = (_activate(at, act, alpha) * gain).abs() <= clamp
    grad_dy = gg * _slope(at, act, alpha) * gain * inside
    grad_x = gg * dy * _curvature(at, act, alpha) * gain * inside
    return grad_dy, grad_x, _bias_grad(grad_x, bias, dim)


def _check(x: Tensor, bias: Tensor | None, dim: int, *_: Any) -> None:
    check_tensor("x", x)
    if bias is None:
        return
    if not 0 <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x (shape {tuple(x.shape)}), got {dim}")
    check_tensor("bias", bias, like=("x", x), shape=(x.shape[dim],))


def _check_backward(dy: Tensor, saved: Tensor, bias: Tensor | None, dim: int, *_: Any) -> None:
    _check(saved, bias, dim)
    check_tensor("grad_output", dy, like=("x", saved), shape=saved.shape)


def _check_double_backward(
    gg: Tensor, dy: Tensor, x: Tensor, bias: Tensor | None, dim: int, *_: Any
) -> None:
    _check_backward(dy, x, bias, dim)
    check_tensor("grad_grad", gg, like=("x", x), shape=x.shape)


_bias_act = Op(
    "bias_act(Tensor x, Tensor? bias, int dim, int act, float alpha, float gain, float clamp)"
    " -> Tensor",
    _reference,
    _check,
    stem="bias_act",
)
_backward = Op(
    "bias_act_backward(Tensor grad_output, Tensor saved, Tensor? bias, int dim, int act,"
    " float alpha, float gain, float clamp, bool from_output) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="bias_act",
)
_double_backward = Op(
    "bias_act_double_backward(Tensor grad_grad, Tensor grad_output, Tensor x, Tensor? bias,"
    " int dim, int act, float alpha, float gain, float clamp) -> (Tensor, Tensor, Tensor)",
    _reference_double_backward,
    _check_double_backward,
    stem="bias_act",
)


class _BiasAct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        y = _bias_act(x, bias, *options[:5])
        ctx.options = options
        ctx.save_for_backward(y if options[-1] else x, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        saved, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dbias = _BiasActBackward.apply(dy, saved, bias, ctx.options)
        else:
            dx, dbias = _backward(dy, saved, bias, *ctx.options)
        return dx, None if bias is None else dbias, None


class _BiasActBackward(Function):
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
            spread = _over_channels(gg_bias, saved, options[0])
            gg = spread.expand_as(saved) if gg is None else gg + spread
        if gg is None:
            return None, None, None, None
        if options[-1]:  # piecewise linear: the derivative does not depend on x
            if torch.is_grad_enabled():
                return _BiasActBackward.apply(gg, saved, None, options)[0], None, None, None
            return _backward(gg, saved, None, *options)[0], None, None, None
        # A third derivative is torch's own, through the reference.
        run = _reference_double_backward if torch.is_grad_enabled() else _double_backward
        grad_dy, grad_x, grad_bias = run(gg, dy, saved, bias, *options[:-1])
        return grad_dy, grad_x, None if bias is None else grad_bias, None

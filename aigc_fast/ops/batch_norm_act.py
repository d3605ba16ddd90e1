"""Batch normalisation and activation in one operator, with a double backward of its own."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._activations import activate, curvature, resolve, slope
from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import FLOATS, Op


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    """y = gain * act((x - mean) / sqrt(var + eps) * weight + bias), per channel.

    x:            shape (N, C, ...), float64/32/16 or bfloat16. Its memory order (contiguous,
                  channels_last, any permutation) is that of y; a tensor with gaps is copied once.
    running_mean, running_var: shape (C,) or None. In evaluation they are mean and var; in training
                  they are moved by `momentum` towards the batch's mean and unbiased variance.
    weight, bias: shape (C,) or None, of x's dtype or any other floating one (float32 parameters
                  with a bfloat16 x).
    training:     take mean and (biased) variance from x, over all dimensions but 1.
    eps:          added to the variance, any size.
    act, alpha:   as in `bias_act`: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish.
    gain:         factor on the activation; 1 by default, so that the call stands for
                  torch.nn.functional.batch_norm and the activation of torch.

    Computes in fp32 (fp64 for fp64) and rounds once; the variance is summed from deviations, so a
    large mean costs no digits. Saves x and the statistics for backward. Any order of derivative;
    forward, backward and double backward are kernels. Bytes that must move, times x: forward 3
    (2 in evaluation), backward 5, double backward 8; on the CPU 2, 3 and 5 where a channel of a
    contiguous x fits the L2 cache.

    Raises TypeError or ValueError for a wrong dtype, shape, device, act or alpha, for fewer than
    two values a channel in training, and for missing statistics in evaluation.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    number, alpha = resolve(act, alpha)
    options = (training, eps, number, gain, alpha)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        y, mean, var = _BatchNormAct.call(x, running_mean, running_var, weight, bias, options)
    else:
        y, mean, var = _batch_norm_act(x, running_mean, running_var, weight, bias, *options)
    if training and x.shape[1]:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = var * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Parts:
    """What the references share: statistics and normalised x, in the precision of the sums."""

    def __init__(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, training: bool, eps: float,
    ) -> None:  # fmt: skip
        self.like, self.wide = x, _wide(x)
        self.dims = [d for d in range(x.dim()) if d != 1]
        if training:  # from x, so that derivatives of the references reach it
            mean = self.wide.mean(self.dims)
            var = (self.wide - self.over(mean)).square().mean(self.dims)
        assert mean is not None and var is not None
        self.mean, self.var = mean.to(self.wide.dtype), var.to(self.wide.dtype)
        self.rstd = self.over(torch.rsqrt(self.var + eps))
        self.normed = (self.wide - self.over(self.mean)) * self.rstd
        self.weight = self.normed.new_ones(()) if weight is None else self.over(weight)
        self.z = self.normed * self.weight
        if bias is not None:
            self.z = self.z + self.over(bias)
        self.share = x.shape[1] / max(x.numel(), 1) if training else 0.0

    def over(self, value: Tensor) -> Tensor:
        """(C,) against x"""
        return value.to(self.wide.dtype).reshape(1, -1, *[1] * (self.like.dim() - 2))

    def sum(self, value: Tensor) -> Tensor:
        return value.sum(self.dims, keepdim=True)

    def through_norm(self, grad: Tensor) -> Tensor:
        """The gradient of x for that of the normalised x."""
        means = self.sum(grad) + self.normed * self.sum(grad * self.normed)
        return self.rstd * (grad - means * self.share)

    def like_x(self, value: Tensor) -> Tensor:
        return torch.empty_like(self.like).copy_(value)


def _like(value: Tensor, parameter: Tensor | None) -> Tensor:
    """Sums of shape (1, C, 1, ...) as the gradient of `parameter`, empty where there is none."""
    if parameter is None:
        return value.new_empty(0)
    return value.flatten().to(parameter.dtype)


def _reference(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, training: bool, eps: float, act: int, gain: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = _Parts(x, running_mean, running_var, weight, bias, training, eps)
    y = p.like_x(activate(p.z, act, alpha) * gain)
    if training:
        return y, p.mean, p.var
    return y, p.mean.new_empty(0), p.mean.new_empty(0)


def _reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    training: bool, eps: float, act: int, gain: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = _Parts(x, mean, var, weight, bias, training, eps)
    g = _wide(dy) * slope(p.z, act, alpha) * gain
    dx = p.like_x(p.through_norm(g * p.weight))
    return dx, _like(p.sum(g * p.normed), weight), _like(p.sum(g), bias)


def _reference_double_backward(
    gg: Tensor, gg_weight: Tensor | None, gg_bias: Tensor | None, dy: Tensor, x: Tensor,
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    training: bool, eps: float, act: int, gain: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = _Parts(x, mean, var, weight, bias, training, eps)
    gg, dy = _wide(gg), _wide(dy)
    s, share, scale = slope(p.z, act, alpha) * gain, p.share, p.weight * p.rstd
    g = dy * s
    # dx = scale (g - share (sum g + normed sum(g normed))): what <gg, dx> gives g, ...
    to_g = p.through_norm(gg) * p.weight
    # ... the normalised x, directly, ...
    pair, pair_gg = p.sum(g * p.normed), p.sum(gg * p.normed)
    to_normed = -scale * share * (gg * pair + g * pair_gg)
    # ... and the scale
    to_scale = p.sum(gg * g) - share * (p.sum(gg) * p.sum(g) + pair_gg * pair)
    if gg_weight is not None:  # dweight = sum(g normed)
        to_g = to_g + p.over(gg_weight) * p.normed
        to_normed = to_normed + p.over(gg_weight) * g
    if gg_bias is not None:  # dbias = sum g
        to_g = to_g + p.over(gg_bias)
    to_z = to_g * dy * curvature(p.z, act, alpha) * gain
    grad_x = p.through_norm(to_normed + p.weight * to_z)
    # The derivative of rstd with respect to x is -share rstd^2 normed.
    grad_x = grad_x - p.weight * to_scale * share * p.rstd.square() * p.normed
    grad_weight = p.rstd * to_scale + p.sum(to_z * p.normed)
    return (
        p.like_x(to_g * s),
        p.like_x(grad_x),
        _like(grad_weight, weight),
        _like(p.sum(to_z), bias),
    )


def _check(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, training: bool, *_: Any,
) -> None:  # fmt: skip
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    for name, value in {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }.items():
        if value is not None:
            check_tensor(name, value, dtypes=FLOATS, shape=(channels,))
            if value.device != x.device:
                raise ValueError(
                    f"{name} must be on the device of x ({x.device}), got {value.device}"
                )
        elif not training and name.startswith("running"):
            raise ValueError(f"{name} must be given in evaluation (training=False), got None")
    if training and channels and x.numel() < 2 * channels:
        raise ValueError(
            f"x must have at least 2 values a channel in training, got shape {tuple(x.shape)}"
        )


def _check_backward(dy: Tensor, x: Tensor, *options: Any) -> None:
    _check(x, *options)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


def _check_double_backward(
    gg: Tensor, gg_weight: Tensor | None, gg_bias: Tensor | None, dy: Tensor, x: Tensor, *rest: Any
) -> None:
    _check_backward(dy, x, *rest)
    check_tensor("grad_grad", gg, like=("x", x), shape=x.shape)
    for name, value in {"grad_grad_weight": gg_weight, "grad_grad_bias": gg_bias}.items():
        if value is not None:
            check_tensor(name, value, dtypes=FLOATS, shape=(x.shape[1],))


_OPTIONS = "bool training, float eps, int act, float gain, float alpha"
_batch_norm_act = Op(
    "batch_norm_act(Tensor x, Tensor? running_mean, Tensor? running_var, Tensor? weight,"
    f" Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _reference,
    _check,
    stem="batch_norm_act",
)
_backward = Op(
    "batch_norm_act_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor var,"
    f" Tensor? weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="batch_norm_act",
)
_double_backward = Op(
    "batch_norm_act_double_backward(Tensor grad_grad, Tensor? grad_grad_weight,"
    " Tensor? grad_grad_bias, Tensor grad_output, Tensor x, Tensor mean, Tensor var,"
    f" Tensor? weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_double_backward,
    _check_double_backward,
    stem="batch_norm_act",
)


class _BatchNormAct(OpFunction):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple,
    ) -> tuple:
        y, mean, var = _batch_norm_act(x, running_mean, running_var, weight, bias, *options)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        statistics = (mean, var) if options[0] else (running_mean, running_var)
        ctx.save_for_backward(x, *statistics, weight, bias)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
        if dy is None:
            return (None,) * 6
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dweight, dbias = _BatchNormActBackward.call(dy, *saved, ctx.options)
        else:
            dx, dweight, dbias = _backward(dy, *saved, *ctx.options)
        weight, bias = saved[3:]
        return (
            dx,
            None,
            None,
            None if weight is None else dweight,
            None if bias is None else dbias,
            None,
        )


class _BatchNormActBackward(OpFunction):
    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple,
    ) -> tuple:
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, mean, var, weight, bias)
        return _backward(dy, x, mean, var, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gg: Tensor | None, gg_weight: Tensor | None, gg_bias: Tensor | None):  # type: ignore[no-untyped-def]
        dy, x, mean, var, weight, bias = ctx.saved_tensors
        gg_weight = None if weight is None else gg_weight
        gg_bias = None if bias is None else gg_bias
        if gg is None:
            if gg_weight is None and gg_bias is None:
                return (None,) * 7
            gg = torch.zeros_like(x)
        # A third derivative is torch's own, through the reference.
        run = _reference_double_backward if torch.is_grad_enabled() else _double_backward
        grad_dy, grad_x, grad_weight, grad_bias = run(
            gg, gg_weight, gg_bias, dy, x, mean, var, weight, bias, *ctx.options
        )
        return (
            grad_dy,
            grad_x,
            None,
            None,
            None if weight is None else grad_weight,
            None if bias is None else grad_bias,
            None,
        )

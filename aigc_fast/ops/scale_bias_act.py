"""Scale of each sample's channels, noise, bias, activation, gain and clamp in one pass."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._activations import resolve
from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import in_order_of, wide
from aigc_fast.ops._registry import FLOATS, define
from aigc_fast.ops.bias_act import bias_act

#: numbers of the activations that are lrelu, and the alphas of those that have their own
_LINEAR, _RELU, _LRELU = range(3)
_ALPHA = {_LINEAR: 1.0, _RELU: 0.0}


def scale_bias_act(
    x: Tensor,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = clip(gain * act(x * scale + noise * strength + bias), -clamp, clamp).

    x:        (batch, channels, *spatial), float64/32/16 or bfloat16. Contiguous or channels_last (2
              or 3 spatial dimensions), which y keeps; other strides are copied once to contiguous.
    scale:    (batch, channels), or None for 1.
    noise:    (batch, 1, *spatial) or (1, 1, *spatial), or None for 0.
    strength: one element in any shape, or None for 1.
    bias:     (channels,), or None for 0.
    act, alpha, gain, clamp: as for `bias_act`.

    Parameters need not have the dtype of x, but are float64 where it is, and only there. Computes
    in fp32 (fp64 for fp64) and rounds once; a smooth activation takes a second pass, through
    `bias_act`. The gradients of scale, strength and bias are summed in fp64 in the pass that writes
    that of x; one of noise takes passes of its own. Saves x. Bytes that must move: forward 2,
    backward 3, double backward 5 times x.

    Raises TypeError or ValueError for a wrong dtype, shape, device, act, alpha or clamp.

    Source: the modulation, demodulation and noise of StyleGAN2 (Karras et al. 2020,
    arXiv:1912.04958).
    """
    number, resolved, default_gain, _ = resolve(act, alpha, clamp)
    recording = torch.is_grad_enabled()
    if noise is not None and recording and noise.requires_grad:
        z = scale_bias_act(x, scale) + (noise if strength is None else noise * strength)
        own = None if bias is None else bias.to(x.dtype)
        return bias_act(z.to(x.dtype), own, 1, act, alpha, gain, clamp)
    if number > _LRELU:
        z = scale_bias_act(x, scale, noise, strength, bias)
        return bias_act(z, None, 1, act, alpha, gain, clamp)
    options = _ALPHA.get(number, resolved), default_gain if gain is None else gain, clamp
    if recording and any(t is not None and t.requires_grad for t in (x, scale, strength, bias)):
        return _ScaleBiasAct.call(x, scale, noise, strength, bias, options)
    return _scale_bias_act(x, scale, noise, strength, bias, *options)


def _over_pixels(p: Tensor | None, x: Tensor, missing: float) -> Tensor | float:
    """scale or bias, to be broadcast with x."""
    if p is None:
        return missing
    return wide(p).reshape(*p.shape[:-1], x.shape[1], *[1] * (x.dim() - 2))


def _pixels(noise: Tensor | None, strength: Tensor | None) -> Tensor | float:
    if noise is None:
        return 0.0
    return wide(noise) if strength is None else wide(noise) * wide(strength).reshape(())


def _before_act(
    x: Tensor, scale: Tensor | None, noise: Tensor | None, strength: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    z = wide(x) * _over_pixels(scale, x, 1.0)
    return z + _pixels(noise, strength) + _over_pixels(bias, x, 0.0)


def _act(z: Tensor, alpha: float, gain: float) -> Tensor:
    return (F.leaky_relu(z, alpha) if alpha else F.relu(z)) * gain


def _slope(z: Tensor, alpha: float, gain: float, clamp: float | None) -> Tensor:
    # Two Python numbers would make float32, and 0.2 not that of float64.
    d = torch.where(z > 0, torch.ones_like(z), alpha) * gain
    limit = math.inf if clamp is None else clamp
    return d.masked_fill(_act(z, alpha, gain).abs() > limit, 0.0)


def _reference(
    x: Tensor, scale: Tensor | None = None, noise: Tensor | None = None,
    strength: Tensor | None = None, bias: Tensor | None = None, alpha: float = 1.0,
    gain: float = 1.0, clamp: float | None = None,
) -> Tensor:  # fmt: skip
    y = _act(_before_act(x, scale, noise, strength, bias), alpha, gain)
    return in_order_of(y if clamp is None else y.clamp(-clamp, clamp), x)


def _sum_like(terms: Tensor, parameter: Tensor | None) -> Tensor:
    """`terms`, of x's shape, summed over all that the parameter is the same for."""
    if parameter is None:
        return terms.new_empty(0, dtype=torch.float32)
    sums = terms.sum(list(range(2, terms.dim()))) if terms.dim() > 2 else terms
    if parameter.shape != sums.shape:
        sums = sums.sum(0) if parameter.shape == sums.shape[1:] else sums.sum()
    return sums.to(parameter.dtype).reshape(parameter.shape).contiguous()


def _reference_backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, noise: Tensor | None, strength: Tensor | None,
    bias: Tensor | None, alpha: float, gain: float, clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z = _before_act(x, scale, noise, strength, bias)
    g = wide(dy) * _slope(z, alpha, gain, clamp)
    dx = in_order_of(g * _over_pixels(scale, x, 1.0), x)
    dstrength = _sum_like(g * _pixels(noise, None), strength)
    return dx, _sum_like(g * wide(x), scale), dstrength, _sum_like(g, bias)


def _reference_double_backward(
    gg_x: Tensor | None, gg_scale: Tensor | None, gg_strength: Tensor | None,
    gg_bias: Tensor | None, dy: Tensor, x: Tensor, scale: Tensor | None, noise: Tensor | None,
    strength: Tensor | None, bias: Tensor | None, alpha: float, gain: float, clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    slope = _slope(_before_act(x, scale, noise, strength, bias), alpha, gain, clamp)
    g, to_scale = wide(dy) * slope, _over_pixels(gg_scale, x, 0.0)
    to_x = torch.zeros_like(g) if gg_x is None else wide(gg_x)
    # What z changes by as x, scale, strength and bias change.
    u = to_x * _over_pixels(scale, x, 1.0) + wide(x) * to_scale + _over_pixels(gg_bias, x, 0.0)
    if gg_strength is not None:
        u = u + _pixels(noise, gg_strength)
    return in_order_of(slope * u, x), in_order_of(g * to_scale, x), _sum_like(g * to_x, scale)


def _check(
    x: Tensor, scale: Tensor | None = None, noise: Tensor | None = None,
    strength: Tensor | None = None, bias: Tensor | None = None, *_: Any,
) -> None:  # fmt: skip
    check_tensor("x", x, min_ndim=2)
    dtypes = [d for d in FLOATS if (d == torch.float64) == (x.dtype == torch.float64)]
    samples = 1 if noise is not None and len(noise) == 1 else x.shape[0]
    one = () if strength is None or strength.numel() != 1 else strength.shape
    shapes = {
        "scale": (scale, x.shape[:2]),
        "noise": (noise, (samples, 1, *x.shape[2:])),
        "strength": (strength, one),
        "bias": (bias, x.shape[1:2]),
    }
    for name, (p, shape) in shapes.items():
        if p is None:
            continue
        check_tensor(name, p, dtypes=dtypes, shape=shape)
        check_device(name, p, ("x", x))
    if strength is not None and noise is None:
        raise ValueError("strength must be None where there is no noise")


def _check_backward(dy: Tensor, x: Tensor, *options: Any) -> None:
    _check(x, *options)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


def _check_double_backward(
    gg_x: Tensor | None, gg_scale: Any, gg_strength: Any, gg_bias: Any, dy: Tensor, x: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    _check_backward(dy, x, *options)
    if gg_x is not None:
        check_tensor("grad_grad", gg_x, like=("x", x), shape=x.shape)


_scale_bias_act = define(
    "scale_bias_act(Tensor x, Tensor? scale=None, Tensor? noise=None, Tensor? strength=None,"
    " Tensor? bias=None, float alpha=1.0, float gain=1.0, float? clamp=None) -> Tensor",
    _reference,
    _check,
    stem="scale_bias_act",
)
_backward = define(
    "scale_bias_act_backward(Tensor grad_output, Tensor x, Tensor? scale, Tensor? noise,"
    " Tensor? strength, Tensor? bias, float alpha, float gain, float? clamp)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="scale_bias_act",
)
_double_backward = define(
    "scale_bias_act_double_backward(Tensor? grad_grad, Tensor? grad_scale, Tensor? grad_strength,"
    " Tensor? grad_bias, Tensor grad_output, Tensor x, Tensor? scale, Tensor? noise,"
    " Tensor? strength, Tensor? bias, float alpha, float gain, float? clamp)"
    " -> (Tensor, Tensor, Tensor)",
    _reference_double_backward,
    _check_double_backward,
    stem="scale_bias_act",
)


class _ScaleBiasAct(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *parameters, options = rest
        ctx.options = options
        ctx.save_for_backward(x, *parameters)
        return _scale_bias_act(x, *parameters, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _ScaleBiasActBackward.call(dy, *saved, ctx.options)
        else:
            grads = _backward(dy, *saved, *ctx.options)
        dx, dscale, dstrength, dbias = grads
        _, scale, _, strength, bias = saved
        return (
            dx,
            None if scale is None else dscale,
            None,
            None if strength is None else dstrength,
            None if bias is None else dbias,
            None,
        )


class _ScaleBiasActBackward(OpFunction):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, *rest: Any) -> tuple:
        *parameters, options = rest
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, *parameters)
        return _backward(dy, x, *parameters, *options)

    @staticmethod
    def backward(ctx: Any, *gg: Tensor | None) -> tuple:
        dy, x, *parameters = ctx.saved_tensors
        scale, _, strength, bias = parameters
        gg_x, *own = gg
        # A gradient may arrive for the empty result of a parameter that is not there.
        to_scale, to_strength, to_bias = (
            None if p is None else g for p, g in zip((scale, strength, bias), own, strict=True)
        )
        # A third derivative is torch's own, through the reference.
        run: Any = _reference_double_backward if torch.is_grad_enabled() else _double_backward
        grad_dy, grad_x, grad_scale = run(
            gg_x, to_scale, to_strength, to_bias, dy, x, *parameters, *ctx.options
        )
        return grad_dy, grad_x, None if scale is None else grad_scale, *[None] * 4

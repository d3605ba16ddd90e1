"""GroupNorm and the activation after it in one operator."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._activations import with_synonyms
from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import in_order_of, wide
from aigc_fast.ops._registry import define
from aigc_fast.ops.gated_mlp import _activate, _slope


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> Tensor:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias), mean and var of each sample's groups.

    x:          (batch, channels, *spatial) with any number of spatial dimensions, float64/32/16 or
                bfloat16. A contiguous x gives a contiguous y, channels_last (or channels_last_3d) a
                y in that memory order; other strides are copied once to contiguous.
    num_groups: channels / num_groups neighbouring channels form a group.
    weight, bias: shape (channels,), dtype of x, or None for ones and zeros.
    eps:        added to the variance.
    act:        "none", "silu", "gelu" (the erf form) or "gelu_tanh" (its approximation); "linear"
                and "swish" are other names of the first two.

    Computes in fp32 (fp64 for fp64) and rounds once. The variance comes from differences to the
    mean, never from a difference of squares: pieces of a group that the shape alone decides are
    merged by the formula of Chan et al., so the bits do not depend on the number of threads. Saves
    x and the mean and 1 / sqrt(var + eps) of each group. Bytes that must move: forward 2, backward
    3 times x; where a group outgrows the cache, and in channels_last, 3 and 5.

    Raises TypeError or ValueError for a wrong dtype, shape, device, num_groups or act.

    Source: Wu and He 2018, arXiv:1803.08494; Chan, Golub and LeVeque 1979 (STAN-CS-79-773).
    """
    number = check_activation(act)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _GroupNormAct.call(x, weight, bias, num_groups, eps, number)
    return _group_norm_act(x, weight, bias, num_groups, eps, number)[0]


#: activation: number in the schema
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
_BY_NAME = with_synonyms(ACTIVATIONS)


def check_activation(act: str) -> int:
    """Its number; ValueError for what is no activation."""
    number = _BY_NAME.get(act)
    if number is None:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return number


_GATES = {1: None, 2: False, 3: True}  # the same in ops/gated_mlp.py


def activate(z: Tensor, act: int) -> Tensor:
    """The activation of that number."""
    return _activate(z, _GATES[act]) if act else z


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """x as (batch, groups, elements of a group) in fp32 or fp64."""
    size = x.shape[1] // num_groups * x.shape[2:].numel()
    return wide(x).reshape(x.shape[0], num_groups, size)


def _per_channel(p: Tensor | None, x: Tensor, missing: float) -> Tensor | float:
    return missing if p is None else wide(p).reshape(-1, *[1] * (x.dim() - 2))


def _statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    grouped = _grouped(x, num_groups)
    size = max(grouped.shape[-1], 1)  # a mean of nothing would warn
    mean = grouped.sum(-1, keepdim=True) / size
    var = (grouped - mean).square().sum(-1) / size
    return mean.squeeze(-1), torch.rsqrt(var + eps)


def _normed(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    grouped = _grouped(x, mean.shape[1])
    return ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).reshape(x.shape)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, act: int
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = _statistics(x, num_groups, eps)
    z = _normed(x, mean, rstd) * _per_channel(weight, x, 1.0) + _per_channel(bias, x, 0.0)
    z = z.to(x.dtype)  # as two operations of torch would round it
    return in_order_of(activate(z, act), x), mean, rstd


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, grad = _normed(x, mean, rstd), wide(dy)
    scale = _per_channel(weight, x, 1.0)
    if act:
        grad = grad * _slope(normed * scale + _per_channel(bias, x, 0.0), _GATES[act])
    g, n = _grouped(grad * scale, num_groups), _grouped(normed, num_groups)
    size = max(g.shape[-1], 1)
    inner = g.sum(-1, keepdim=True) / size + n * ((g * n).sum(-1, keepdim=True) / size)
    dx = in_order_of(((g - inner) * rstd.unsqueeze(-1)).reshape(x.shape), x)
    over = [d for d in range(x.dim()) if d != 1]
    dweight = dx.new_empty(0) if weight is None else (grad * normed).sum(over).to(x.dtype)
    dbias = dx.new_empty(0) if bias is None else grad.sum(over).to(x.dtype)
    return dx, dweight, dbias


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, *_: Any) -> None:
    check_tensor("x", x, min_ndim=2)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"num_groups must divide the channels of x ({x.shape[1]}), got {num_groups}"
        )
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check_tensor(name, p, like=("x", x), shape=x.shape[1:2])


def _check_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    *_: Any,
) -> None:
    _check(x, weight, bias, num_groups)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)
    for name, p in (("mean", mean), ("rstd", rstd)):
        check_tensor(name, p, shape=(x.shape[0], num_groups))


_group_norm_act = define(
    "group_norm_act(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps, int act)"
    " -> (Tensor, Tensor, Tensor)",
    _reference,
    _check,
    stem="group_norm_act",
)
_backward = define(
    "group_norm_act_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd,"
    " Tensor? weight, Tensor? bias, int num_groups, int act) -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="group_norm_act",
)


class _GroupNormAct(OpFunction):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        act: int,
    ) -> Tensor:
        y, mean, rstd = _group_norm_act(x, weight, bias, num_groups, eps, act)
        ctx.options = num_groups, eps, act
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups, eps, act = ctx.options
        run: Any = _backward
        if torch.is_grad_enabled():
            # Made of differentiable operations: higher derivatives are torch's own.
            run = _reference_backward
            mean, rstd = _statistics(x, num_groups, eps)
        dx, dweight, dbias = run(dy, x, mean, rstd, weight, bias, num_groups, act)
        dweight = None if weight is None else dweight
        return dx, dweight, None if bias is None else dbias, None, None, None

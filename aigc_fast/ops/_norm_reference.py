"""The maths of norm_act in plain PyTorch, for every choice of what a norm is."""

import torch
from torch import Tensor

from aigc_fast.ops._activations import activate, curvature, slope
from aigc_fast.ops._layout import in_order_of, strided_as, wide

#: whose mean and variance: running ones, a channel's of the batch or of a sample, a pixel's, which
#: is its mean square. The numbers are part of the schema.
GIVEN, BATCH, SAMPLE, PIXEL = range(4)


class Parts:
    """What the three directions share: statistics and normalised x, in the precision of sums."""

    def __init__(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, statistics: int, eps: float,
    ) -> None:  # fmt: skip
        self.like, self.wide, self.statistics = x, wide(x), statistics
        kept = {SAMPLE: (0, 1), PIXEL: (0, *range(2, x.dim()))}.get(statistics, (1,))
        self.dims = [d for d in range(x.dim()) if d not in kept]
        self.shape = [n if d in kept else 1 for d, n in enumerate(x.shape)]
        if statistics != GIVEN:  # from x, so that derivatives of the references reach it
            mean = None if statistics == PIXEL else self.wide.mean(self.dims)
            var = (self.wide - self.over(mean, 0.0)).square().mean(self.dims)
        assert var is not None
        self.mean, self.var = mean, wide(var)
        self.rstd = torch.rsqrt(self.over(self.var, 1.0) + eps)
        self.normed = (self.wide - self.over(mean, 0.0)) * self.rstd
        self.weight = self.over(weight, 1.0)
        self.z = self.normed * self.weight + self.over(bias, 0.0)
        norms = torch.Size(self.shape).numel()
        self.share = 0.0 if statistics == GIVEN else norms / max(x.numel(), 1)

    def over(self, value: Tensor | None, missing: float) -> Tensor:
        """A value for each norm against x."""
        if value is None:
            return self.wide.new_full((), missing)
        return value.to(self.wide.dtype).reshape(self.shape)

    def sum(self, value: Tensor) -> Tensor:
        return value.sum(self.dims, keepdim=True)

    def centred(self, value: Tensor) -> Tensor:
        """value less its mean, where x was."""
        if self.statistics == PIXEL:
            return value
        return value - self.sum(value) * self.share

    def through_norm(self, grad: Tensor) -> Tensor:
        """The gradient of x for that of the normalised x."""
        along = self.normed * (self.sum(grad * self.normed) * self.share)
        return self.rstd * (self.centred(grad) - along)

    def like_x(self, value: Tensor) -> Tensor:
        """value in the dtype of x, and the memory order that results have."""
        if self.statistics <= BATCH:
            return strided_as(value, self.like)
        return in_order_of(value, self.like)


def _like(value: Tensor, parameter: Tensor | None) -> Tensor:
    """A sum over each norm as the gradient of `parameter`, empty where there is none."""
    if parameter is None:
        return value.new_empty(0)
    return value.flatten().to(parameter.dtype)


def forward(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, statistics: int, eps: float, act: int, gain: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = Parts(x, running_mean, running_var, weight, bias, statistics, eps)
    y = p.like_x(activate(p.z, act, alpha) * gain)
    none = p.wide.new_empty(0)
    mean = none if statistics in (GIVEN, PIXEL) or p.mean is None else p.mean.flatten()
    return y, mean, none.clone() if statistics == GIVEN else p.var.flatten()


def backward(
    dy: Tensor, x: Tensor, mean: Tensor | None, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, statistics: int, eps: float, act: int, gain: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = Parts(x, mean, var, weight, bias, statistics, eps)
    g = wide(dy) * slope(p.z, act, alpha) * gain
    dx = p.like_x(p.through_norm(g * p.weight))
    return dx, _like(p.sum(g * p.normed), weight), _like(p.sum(g), bias)


def double_backward(
    gg: Tensor, gg_weight: Tensor | None, gg_bias: Tensor | None, dy: Tensor, x: Tensor,
    mean: Tensor | None, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    statistics: int, eps: float, act: int, gain: float, alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = Parts(x, mean, var, weight, bias, statistics, eps)
    gg, dy = wide(gg), wide(dy)
    s, scale = slope(p.z, act, alpha) * gain, p.weight * p.rstd
    g = dy * s
    # dx = scale (g - mean g - normed mean(g normed)): what <gg, dx> gives g, ...
    to_g = p.through_norm(gg) * p.weight
    # ... the normalised x, directly, ...
    pair, pair_gg = p.sum(g * p.normed), p.sum(gg * p.normed)
    to_normed = -scale * p.share * (gg * pair + g * pair_gg)
    # ... and the scale.
    to_scale = p.sum(gg * p.centred(g)) - pair_gg * pair * p.share
    if gg_weight is not None:  # dweight = sum(g normed)
        to_g = to_g + p.over(gg_weight, 0.0) * p.normed
        to_normed = to_normed + p.over(gg_weight, 0.0) * g
    if gg_bias is not None:  # dbias = sum g
        to_g = to_g + p.over(gg_bias, 0.0)
    to_z = to_g * dy * curvature(p.z, act, alpha) * gain
    grad_x = p.through_norm(to_normed + p.weight * to_z)
    # The derivative of rstd with respect to x is -rstd^2 normed / count.
    grad_x = grad_x - p.weight * to_scale * p.share * p.rstd.square() * p.normed
    grad_weight = p.rstd * to_scale + p.sum(to_z * p.normed)
    return (
        p.like_x(to_g * s),
        p.like_x(grad_x),
        _like(grad_weight, weight),
        _like(p.sum(to_z), bias),
    )

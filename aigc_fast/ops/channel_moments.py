"""Mean and variance of every channel in one pass, differentiable to any order."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._norm_act import normalize
from aigc_fast.ops._registry import define


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, var) over all dimensions but 1, var being the mean squared deviation (biased).

    x: shape (N, C, ...), float64/32/16 or bfloat16, of any memory order; a tensor with gaps is
       copied once.

    Both are (C,), float32 (float64 for float64), and zero where a channel has no elements; of one
    with NaN or inf neither is finite. Sums are joined in fp64; a large mean costs no digits. Bytes
    that must move: forward 1, backward 2 times x.

    Raises TypeError or ValueError for a wrong dtype or fewer than 2 dimensions.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _ChannelMoments.call(x)
    return _channel_moments(x)


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    z, dims = wide(x), [0, *range(2, x.dim())]
    count = max(x.numel() // max(x.shape[1], 1), 1)
    mean = z.sum(dims, keepdim=True) / count
    return mean.flatten(), (z - mean).square().sum(dims) / count


def _check(x: Tensor) -> None:
    check_tensor("x", x, min_ndim=2)


_channel_moments = define(
    "channel_moments(Tensor x) -> (Tensor, Tensor)", _reference, _check, stem="norm_act"
)


class _ChannelMoments(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _channel_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean, _ = channel_moments(x)  # one that x has a gradient through
        count = max(x.numel() // max(x.shape[1], 1), 1)
        # dmean / count + 2 dvar / count (x - mean)
        return normalize(x, mean, torch.ones_like(mean), 2 * dvar / count, dmean / count, eps=0.0)

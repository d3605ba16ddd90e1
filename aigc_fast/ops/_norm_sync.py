"""A batch norm whose batch is spread over several processes: moments, one exchange, one pass."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from aigc_fast.ops.channel_moments import channel_moments


def joined_moments(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased and unbiased variance) of the channels of all processes' x, differentiable.

    One collective of 2 C + 1 fp64 numbers a process, and one in each backward. Processes' means and
    variances are joined by Chan's rule, so that a large mean costs no digits.
    """
    mean, var = channel_moments(x)
    count = torch.full_like(mean[:1], x.numel() // max(x.shape[1], 1))
    own = torch.cat([mean, var, count]).double()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # In a row of its own, a process's numbers are not summed with those of others.
    place = (rank * len(own), (size - 1 - rank) * len(own))
    rows = _SumOverProcesses.apply(F.pad(own, place), group).view(size, -1)
    means, variances, counts = rows.split([len(mean), len(var), 1], 1)
    total = counts.sum()
    joined = (counts * means).sum(0) / total.clamp_min(1)
    squares = (counts * (variances + (means - joined).square())).sum(0)
    biased, unbiased = (squares / n.clamp_min(1) for n in (total, total - 1))
    return joined.to(mean.dtype), biased.to(mean.dtype), unbiased.to(mean.dtype)


class _SumOverProcesses(Function):
    """Every process gets the sum; so does its gradient, in every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(grad, ctx.group), None

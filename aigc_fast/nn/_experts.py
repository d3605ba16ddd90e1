"""Mixtures of experts: rows sorted by the expert that they are sent to, and back."""

from collections.abc import Callable

import torch
from torch import Tensor


def through_experts(
    x: Tensor,
    experts: Tensor,
    factors: Tensor,
    num_experts: int,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The sum over j of what the expert experts[t, j] makes of row t and factors[t, j].

    x:       (tokens, width).
    experts: int64 (tokens, k), in [0, num_experts).
    factors: (tokens, k), of any floating dtype.
    run:     run(rows, factors, ends) of the tokens * k rows in the order of their experts: those of
             expert e end before ends[e], int32 (num_experts,). Its factors are (tokens * k, 1).

    Returns (tokens, width of what `run` returns).
    """
    tokens, k = experts.shape
    chosen, pairs = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(
        chosen, torch.arange(1, num_experts + 1, device=chosen.device), out_int32=True
    )
    rows = x.index_select(0, pairs.div(k, rounding_mode="floor"))
    y = run(rows, factors.flatten()[pairs, None], ends)
    places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=x.device))
    return y.index_select(0, places).view(tokens, k, y.shape[1]).sum(1)

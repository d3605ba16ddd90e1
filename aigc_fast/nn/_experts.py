"""Mixtures of experts: rows sorted by the expert that they are sent to, and back."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import ops


def through_experts(
    x: Tensor, experts: Tensor, num_experts: int, run: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The sum over j of what the expert experts[t, j] makes of row t.

    x:       (tokens, width).
    experts: int64 (tokens, k), in [0, num_experts).
    run:     run(rows, pairs, ends) of the tokens * k rows in the order of their experts: those of
             expert e end before ends[e], int32 (num_experts,). Row i is that of the entry pairs[i]
             of experts, flattened.

    Returns (tokens, width of what `run` returns).
    """
    tokens, k = experts.shape
    chosen, pairs = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(
        chosen, torch.arange(1, num_experts + 1, device=chosen.device), out_int32=True
    )
    y = run(x.index_select(0, pairs.div(k, rounding_mode="floor")), pairs, ends)
    places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=x.device))
    return y.index_select(0, places).view(tokens, k, y.shape[1]).sum(1)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows by a weight of its own.

    x:      (rows, in_features).
    weight: (groups, out_features, in_features).
    ends:   int32 (groups,), where the rows of each group end; the last is `rows`.

    In bfloat16 on a GPU, or within torch.compile, torch's `grouped_mm`, which does not wait for
    `ends`; else `ops.linear` group by group.
    """
    if _has_grouped_product(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # One by one a weight's gradient would be written for all of them at a time.
    weights = weight.unbind() if weight.requires_grad and torch.is_grad_enabled() else weight
    parts = [ops.linear(x[rows], weights[e]) for e, rows in groups_of(ends)]
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


def groups_of(ends: Tensor) -> list[tuple[int, slice]]:
    """The number and the rows of each group that has any."""
    bounds = [0, *ends.tolist()]
    rows = enumerate(map(slice, bounds, bounds[1:]))
    return [(e, some) for e, some in rows if some.start < some.stop]


def _has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return (
        (torch.compiler.is_compiling() or (x.is_cuda and aligned))
        and x.dtype == weight.dtype == torch.bfloat16
        and not torch.is_autocast_enabled(x.device.type)
    )

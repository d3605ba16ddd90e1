"""`torch.autograd.grad(..., is_grads_batched=True)` of operators that take lists of tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

#: That of the batch of gradients.
_LEVEL = 1


def one_by_one(operator: Callable[..., Any], *args: Any) -> Any:
    """Of each gradient by itself, as torch loops over operators without lists; it has no such loop
    for those with them. What `Batched` means to torch's dispatcher.

    Raises NotImplementedError for a batch within a batch.
    """
    given, form = tree_flatten(args)
    rows = [torch._remove_batch_dim(v, _LEVEL, 1, 0) if _is_batched(v) else None for v in given]
    if any(map(_is_batched, rows)):
        raise NotImplementedError("is_grads_batched=True within another is not supported")
    pairs = list(zip(given, rows, strict=True))
    results = [
        operator(*tree_unflatten([v if r is None else r[i] for v, r in pairs], form))
        for i in range(next(len(r) for r in rows if r is not None))
    ]
    return tree_map(lambda *each: torch._add_batch_dim(torch.stack(each), 0, _LEVEL), *results)


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and is_legacy_batchedtensor(value)

"""Attention to the parts of a cache, put together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_device, check_tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to the whole of a cache from that to its parts, as of a prefix that many share.

    outs: two or more results of `decode_attention` for the same queries and different entries,
          (batch, q_len, num_heads, head_dim).
    lses: their logarithms, (batch, q_len, num_heads), float32 or float64.

    Returns what decode_attention with return_lse gives for all the entries: the results weighted by
    exp(lse), in their dtype, and log(sum(exp(lses))). Plain PyTorch, differentiable.

    Raises TypeError or ValueError for a wrong number, dtype, shape or device.
    """
    if len(outs) < 2 or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must be as many, at least 2, got {len(outs)} and {len(lses)}"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        name = f"outs[{i}]"
        check_tensor(name, out, like=("outs[0]", outs[0]) if i else None, shape=outs[0].shape)
        check_tensor(f"lses[{i}]", lse, dtypes=(torch.float32, torch.float64), shape=out.shape[:-1])
        check_device(f"lses[{i}]", lse, (name, out))
    parts = torch.stack(tuple(lses))
    whole = parts.logsumexp(0)
    weights = (parts - whole.masked_fill(whole == -torch.inf, 0)).exp()
    merged = sum(w[..., None] * out.to(w.dtype) for w, out in zip(weights, outs, strict=True))
    return merged.to(outs[0].dtype), whole

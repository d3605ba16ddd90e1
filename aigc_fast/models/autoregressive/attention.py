"""Attention of a layer: which implementation runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import ops


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the newest tokens.

    Args:
        query: (batch, q_len, num_heads, head_dim).
        keys, values: (batch, length, num_kv_heads, head_dim), a cache, or the new tokens alone.
        ends: int32 (batch,), the valid entries of a cache with the new tokens counted in; None
            where keys and values are the new tokens and nothing was before them.
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        window: how many of the newest keys a query sees, its own included; None is all.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        (batch, q_len, num_heads, head_dim) in the dtype of query.
    """
    length = keys.shape[1]
    if softcap is not None or (window is not None and window < length):
        return _plain(query, keys, values, ends, scale, window or length, softcap)
    if ends is not None:
        return ops.decode_attention(query, keys, values, ends, scale=scale)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[2] != keys.shape[2],
    ).transpose(1, 2)


def _plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor | None,
    scale: float | None,
    window: int,
    softcap: float | None,
) -> Tensor:
    """Plain PyTorch, for what ops.decode_attention does not take: a window and a softcap.

    It reads the whole cache, and holds q_len * length scores of every head.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_len, head_dim = query.shape[1], query.shape[3]
    grouped = query.to(wide).unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("bikgd,bjkd->bkgij", grouped, keys.to(wide))
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own = torch.arange(q_len, device=query.device)
    if ends is not None:
        own = own + (ends[:, None] - q_len)
    own = own[..., None]  # the entry of each query's own token: (q_len, 1) or (batch, q_len, 1)
    entry = torch.arange(keys.shape[1], device=query.device)
    visible = (entry <= own) & (entry > own - window)
    visible = visible[:, None, None] if ends is not None else visible
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("bkgij,bjkd->bikgd", weights, values.to(wide))
    return out.flatten(2, 3).to(query.dtype)

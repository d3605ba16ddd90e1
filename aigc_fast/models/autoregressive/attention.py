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
    if window is not None and window >= length:
        window = None
    if ends is not None and window is None and softcap is None:
        return ops.decode_attention(query, keys, values, ends, scale=scale)
    if ends is None and softcap is None:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if window is None else _visible(query, length, None, window),
            is_causal=window is None,
            scale=scale,
            enable_gqa=query.shape[2] != keys.shape[2],
        ).transpose(1, 2)
    return _plain(query, keys, values, ends, scale, window or length, softcap)


def _visible(query: Tensor, length: int, ends: Tensor | None, window: int) -> Tensor:
    """Which entries each query sees: bool (q_len, length), or (batch, 1, q_len, length)."""
    own = torch.arange(query.shape[1], device=query.device)
    if ends is not None:
        own = own + (ends[:, None, None] - query.shape[1])
    own = own[..., None]
    entry = torch.arange(length, device=query.device)
    return (entry <= own) & (entry > own - window)


def _plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor | None,
    scale: float | None,
    window: int,
    softcap: float | None,
) -> Tensor:
    """Plain PyTorch, for what neither of the others takes: a window over a cache, and a softcap.

    It reads the whole cache, and holds q_len * length scores of every head.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(wide).unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("bikgd,bjkd->bkgij", grouped, keys.to(wide))
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(query, keys.shape[1], ends, window)
    visible = visible if ends is None else visible[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("bkgij,bjkd->bikgd", weights, values.to(wide))
    return out.flatten(2, 3).to(query.dtype)

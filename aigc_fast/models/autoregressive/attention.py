"""Attention of a layer: which implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._pages import NARROW


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor | None,
    *,
    block_table: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the newest tokens.

    Args:
        query: (batch, q_len, num_heads, head_dim).
        keys, values: (batch, length, num_kv_heads, head_dim), a cache, or the new tokens alone. A
            cache may have another dtype, in which the products are then taken; one of one byte a
            number is multiplied with the query as it is.
        ends: int32 (batch,), the valid entries of a cache with the new tokens counted in; None
            where keys and values are the new tokens and nothing was before them.
        block_table, key_scale, value_scale: of a cache, as for `ops.decode_attention`.
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        window: how many of the newest keys a query sees, its own included; None is all.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        (batch, q_len, num_heads, head_dim) in the dtype of query.
    """
    length = keys.shape[1]
    if window is not None and window >= length and block_table is None:
        window = None
    if ends is None and softcap is None:
        return ops.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if window is None else _visible(query, window),
            is_causal=window is None,
            scale=scale,
            enable_gqa=bool(query.shape[2] != keys.shape[2]),  # to torch.jit.trace a tensor
        ).transpose(1, 2)
    if ends is None:
        trains = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
        if trains and softcap is not None:
            return _softcapped(query, keys, values, scale, window or length, softcap)
        ends = torch.full(query.shape[:1], length, dtype=torch.int32, device=query.device)
    return ops.decode_attention(
        query if keys.dtype in NARROW else query.to(keys.dtype),
        keys,
        values,
        ends,
        block_table=block_table,
        key_scale=key_scale,
        value_scale=value_scale,
        scale=scale,
        window=window,
        softcap=softcap,
    ).to(query.dtype)


def _visible(query: Tensor, window: int) -> Tensor:
    """Which of the new tokens each of them sees: bool (q_len, q_len)."""
    token = torch.arange(query.shape[1], device=query.device)
    distance = token[:, None] - token
    return (distance >= 0) & (distance < window)


def _softcapped(
    query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int, softcap: float
) -> Tensor:
    """Plain PyTorch, for training: neither torch's attention nor decode_attention has a derivative
    with a softcap. It holds q_len * q_len scores of every head."""
    wide = wide_dtype(query.dtype)
    grouped = query.to(wide).unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("bikgd,bjkd->bkgij", grouped, keys.to(wide))
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~_visible(query, window), -torch.inf).softmax(-1)
    out = torch.einsum("bkgij,bjkd->bikgd", weights, values.to(wide))
    return out.flatten(2, 3).to(query.dtype)

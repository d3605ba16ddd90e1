"""Attention of many queries to many keys as one operator, and its gradients as another.

All tensors are (batch, tokens, heads, features).
"""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction, wanted
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale * query key^T) value, differentiable to any order.

    query: (batch, queries, heads, head_dim).
    key:   (batch, keys, kv_heads, head_dim); each head serves heads / kv_heads of the queries'.
    value: (batch, keys, kv_heads, value_dim).
    causal: query i meets keys 0 to i.

    Returns (batch, queries, heads, value_dim), contiguous. Beside its results it takes some MB, and
    for gradients packed copies of the queries of a group of heads: of 32 heads over one with 8,192
    tokens of 128 features half a GB. Second derivatives hold all scores.
    """
    if wanted(query, key, value):
        return _Attention.call(query, key, value, scale, causal)
    return dense_attention(query, key, value, scale, causal)[0]


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """(batch, kv_heads, heads / kv_heads, queries, keys)."""
    grouped = query.unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, key) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    weights = _scores(query, key, scale, causal).softmax(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, value).flatten(2, 3)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = wide(query), wide(key), wide(value)
    lse = _scores(q, k, scale, causal).logsumexp(-1).flatten(1, 2)
    return _plain(q, k, v, scale, causal).to(query.dtype).contiguous(), lse.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> None:
    check_tensor("query", query, ndim=4)
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x, like=("query", query), ndim=4)
    batch, _queries, heads, dim = query.shape
    check_tensor("key", key, shape=(batch, *key.shape[1:3], dim))
    check_tensor("value", value, shape=(*key.shape[:3], value.shape[3]))
    if 0 in key.shape[1:] or heads % key.shape[2]:
        raise ValueError(
            f"key must have tokens, and heads by which those of query ({heads}) divide, got "
            f"{tuple(key.shape)}"
        )
    if value.shape[3] == 0:
        raise ValueError(f"value must have features, got {tuple(value.shape)}")


#: The result, and the logarithms of the sums of exponentials, (batch, heads, queries) in the dtype
#: of the arithmetic.
dense_attention = define(
    "dense_attention(Tensor query, Tensor key, Tensor value, float scale, bool causal)"
    " -> (Tensor, Tensor)",
    _reference,
    _check,
    stem=None,
)


def _reference_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    query_grad: bool,
    key_value_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v = wide(grad), wide(query), wide(key), wide(value)
    grouped = (key.shape[2], -1)
    weights = _scores(q, k, scale, causal).softmax(-1)
    by_weights = torch.einsum("bqhgd,bkhd->bhgqk", g.unflatten(2, grouped), v)
    by_scores = scale * weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True))
    by_query = by_key = by_value = query.new_empty(0)
    if query_grad:
        by_query = torch.einsum("bhgqk,bkhd->bqhgd", by_scores, k).flatten(2, 3)
    if key_value_grad:
        by_key = torch.einsum("bhgqk,bqhgd->bkhd", by_scores, q.unflatten(2, grouped))
        by_value = torch.einsum("bhgqk,bqhgd->bkhd", weights, g.unflatten(2, grouped))
    return (
        by_query.to(query.dtype).contiguous(),
        by_key.to(query.dtype).contiguous(),
        by_value.to(query.dtype).contiguous(),
    )


def _check_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *_: Any
) -> None:
    _check(query, key, value)
    shape = (*query.shape[:3], value.shape[3])
    for name, x in (("grad", grad), ("out", out)):
        check_tensor(name, x, like=("query", query), shape=shape)
    check_tensor("lse", lse, shape=(query.shape[0], query.shape[2], query.shape[1]))


#: The gradients of query, key and value; empty where they are not wanted.
_dense_attention_backward = define(
    "dense_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, float scale, bool causal, bool query_grad, bool key_value_grad)"
    " -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem=None,
)


class _Attention(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> Tensor:
        out, lse = dense_attention(query, key, value, scale, causal)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.how = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        if not torch.is_grad_enabled():
            of_query, *of_others = needed = ctx.needs_input_grad[:3]
            found = _dense_attention_backward(
                grads[0], query, key, value, out, lse, *ctx.how, of_query, any(of_others)
            )
            return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None
        # Views: where one of them came from another, the way there is not theirs to go.
        inputs = [t.view_as(t) for t in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            q, k, v = (wide(t) for t in inputs)
            y = _plain(q, k, v, *ctx.how).to(query.dtype)
        parts = [t for t in inputs if t.requires_grad]
        of = iter(torch.autograd.grad(y, parts, grads[0], create_graph=True))
        return *(next(of) if t.requires_grad else None for t in inputs), None, None

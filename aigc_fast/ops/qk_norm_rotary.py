"""RMSNorm of every query and key head, then rotary position embedding, in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import define
from aigc_fast.ops.rms_norm import _reference as _norm
from aigc_fast.ops.rotary import _reference as _rotate
from aigc_fast.ops.rotary import check_angles


def qk_norm_rotary(
    query_key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
) -> Tensor:
    """apply_rotary(rms_norm(head, weight)) of each head, with query_weight for the query heads.

    query_key:    (batch, seq, num_heads + num_kv_heads, head_dim), query heads first,
                  float64/32/16 or bfloat16, of any strides: a view of a packed projection is read
                  in place. The result is contiguous.
    query_weight, key_weight: (head_dim,), dtype of query_key.
    cos, sin, interleaved: as for `apply_rotary`: (seq, r / 2) or (batch, seq, r / 2), float32 or
                  the dtype of query_key; features behind the first r are not turned.
    num_heads:    how many of the heads are query heads.
    eps:          added to the mean square.

    Computes in fp32 (fp64 for fp64) and rounds once, where the reference rounds after the norm, the
    weight and the rotation, as transformers does. cos and sin are constants. Saves query_key for
    backward; the weight gradients are summed in fp32 over blocks of tokens that the shape alone
    decides. Bytes that must move: forward 2, backward 3 times query_key.

    Raises TypeError or ValueError for a wrong dtype, shape or device, RuntimeError where cos or sin
    requires a gradient.

    Source: Qwen3 (arXiv:2505.09388); Henry et al. 2020, arXiv:2010.04245.
    """
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            raise RuntimeError(
                "qk_norm_rotary has no derivative with respect to cos and sin: pass them detached"
            )
        if query_key.requires_grad or query_weight.requires_grad or key_weight.requires_grad:
            return _QKNormRotary.call(
                query_key, query_weight, key_weight, cos, sin, num_heads, eps, interleaved
            )
    args = (query_key, query_weight, key_weight, cos, sin, num_heads, eps)
    return _qk_norm_rotary(*args, True) if interleaved else _qk_norm_rotary(*args)


def _reference(
    query_key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, eps: float, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    query, key = query_key[:, :, :num_heads], query_key[:, :, num_heads:]
    normed = torch.cat([_norm(query, query_weight, eps), _norm(key, key_weight, eps)], 2)
    return _rotate(normed, cos, sin, interleaved)


def _reference_backward(
    dy: Tensor, query_key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor,
    sin: Tensor, num_heads: int, eps: float, interleaved: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    double = query_key.dtype == torch.float64
    x, dy = (t if double else t.float() for t in (query_key, dy))
    is_query = torch.arange(x.shape[2], device=x.device)[:, None] < num_heads
    weight = torch.where(is_query, query_weight, key_weight).to(x.dtype)
    g = _rotate(dy, cos, sin, interleaved, True)
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, gw = x * factor, g * weight
    dx = (gw - normed * (gw * normed).mean(-1, keepdim=True)) * factor
    of_heads = (g * normed).sum((0, 1)) if weight_grad else x.new_empty(x.shape[2], 0)
    dtype = query_key.dtype
    query_grad, key_grad = of_heads[:num_heads].sum(0), of_heads[num_heads:].sum(0)
    return dx.to(dtype).contiguous(), query_grad.to(dtype), key_grad.to(dtype)


def _check(
    query_key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, *_: Any,
) -> None:  # fmt: skip
    check_tensor("query_key", query_key, ndim=4)
    heads, head_dim = query_key.shape[2:]
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        check_tensor(name, weight, like=("query_key", query_key), shape=(head_dim,))
    check_angles(("query_key", query_key), cos, sin)
    if not 0 <= num_heads <= heads:
        raise ValueError(f"num_heads must be in [0, {heads}], got {num_heads}")


def _check_backward(dy: Tensor, query_key: Tensor, *rest: Any) -> None:
    _check(query_key, *rest)
    check_tensor("grad_output", dy, like=("query_key", query_key), shape=query_key.shape)


_qk_norm_rotary = define(
    "qk_norm_rotary(Tensor query_key, Tensor query_weight, Tensor key_weight, Tensor cos,"
    " Tensor sin, int num_heads, float eps, bool interleaved=False) -> Tensor",
    _reference,
    _check,
    stem="qk_norm_rotary",
)
_backward = define(
    "qk_norm_rotary_backward(Tensor grad_output, Tensor query_key, Tensor query_weight,"
    " Tensor key_weight, Tensor cos, Tensor sin, int num_heads, float eps, bool interleaved,"
    " bool weight_grad) -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="qk_norm_rotary",
)


class _QKNormRotary(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, query_key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor,
        sin: Tensor, num_heads: int, eps: float, interleaved: bool,
    ) -> Tensor:  # fmt: skip
        ctx.options = num_heads, eps, interleaved
        ctx.save_for_backward(query_key, query_weight, key_weight, cos, sin)
        return _qk_norm_rotary(
            query_key, query_weight, key_weight, cos, sin, num_heads, eps, interleaved
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        weight_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        run: Callable[..., Any] = _reference_backward if torch.is_grad_enabled() else _backward
        dx, *dweights = run(dy, *ctx.saved_tensors, *ctx.options, weight_grad)
        return dx, *(dweights if weight_grad else (None, None)), None, None, None, None, None

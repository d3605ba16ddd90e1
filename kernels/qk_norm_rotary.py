"""RMS norm of every query and key head, then rotary position embedding, and backward.

One program takes HEADS heads of one token, which share the angles. In backward it takes a fixed run
of tokens, one after another, and leaves their part of the weight gradients in fp32; the parts are
added in a fixed order. A head is three pieces: the first and the second of each pair that turns,
and what does not turn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .memory_order import contiguous_like
from .rotary import angle_strides, load_pairs, store_pairs
from .rows import with_dense_rows

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (64, 2048), "_backward": (96, 4096)}

_TILE = 2048
_PARTS = 256  # of the weight gradients: about two programs for each SM of the largest GPUs


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask, 0.0).to(tl.float32)


@triton.jit
def _angles(ptr, batch, position, batch_stride, token_stride, i, half):
    return _load(ptr + batch * batch_stride + position * token_stride + i, i < half)


@triton.jit
def _weight(query_ptr, key_ptr, is_query, at, mask):
    return tl.where(is_query, _load(query_ptr + at, mask), _load(key_ptr + at, mask))


@triton.jit
def _weight_pairs(
    query_ptr, key_ptr, is_query, half, INTERLEAVED: tl.constexpr, HALF: tl.constexpr
):
    query_a, query_b = load_pairs(query_ptr, True, half, INTERLEAVED, 1, HALF)
    key_a, key_b = load_pairs(key_ptr, True, half, INTERLEAVED, 1, HALF)
    return tl.where(is_query, query_a, key_a), tl.where(is_query, query_b, key_b)


@triton.jit
def _forward(
    x_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, y_ptr,
    seq, heads, num_heads, head_dim, half, eps,
    x_batch, x_token, x_head, cos_batch, cos_token, sin_batch, sin_token,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // seq, token % seq
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_head, is_query = head < heads, head < num_heads
    x_ptr += batch * x_batch + position * x_token + head.to(tl.int64) * x_head
    y_ptr += (token * heads + head) * head_dim
    a, b = load_pairs(x_ptr, is_head, half, INTERLEAVED, HEADS, HALF)
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if REST:
        j = 2 * half + tl.arange(0, REST)[None, :]
        rest = is_head & (j < head_dim)
        c = _load(x_ptr + j, rest)
        squares += tl.sum(c * c, 1)
    factor = 1.0 / tl.sqrt(squares / head_dim + fp32(eps))[:, None]
    weight_a, weight_b = _weight_pairs(
        query_weight_ptr, key_weight_ptr, is_query, half, INTERLEAVED, HALF
    )
    a *= factor * weight_a
    b *= factor * weight_b
    i = tl.arange(0, HALF)[None, :]
    cos = _angles(cos_ptr, batch, position, cos_batch, cos_token, i, half)
    sin = _angles(sin_ptr, batch, position, sin_batch, sin_token, i, half)
    store_pairs(
        y_ptr, a * cos - b * sin, b * cos + a * sin, is_head, half, INTERLEAVED, HEADS, HALF
    )
    if REST:
        c *= factor * _weight(query_weight_ptr, key_weight_ptr, is_query, j, j < head_dim)
        tl.store(y_ptr + j, c.to(y_ptr.dtype.element_ty), rest)


@triton.jit
def _gradient(x, g, weight, factor, mean):
    """dx from the gradient g of normed * weight."""
    return (g * weight - x * factor * mean) * factor


@triton.jit
def _backward(
    dy_ptr, x_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, dx_ptr, part_ptr,
    seq, tokens, part_tokens, heads, num_heads, head_dim, half, eps,
    dy_batch, dy_token, dy_head, x_batch, x_token, x_head,
    cos_batch, cos_token, sin_batch, sin_token,
    WEIGHT_GRAD: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * part_tokens
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_head, is_query = head < heads, head < num_heads
    i = tl.arange(0, HALF)[None, :]
    weight_a, weight_b = _weight_pairs(
        query_weight_ptr, key_weight_ptr, is_query, half, INTERLEAVED, HALF
    )
    sum_a, sum_b = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    if REST:
        j = 2 * half + tl.arange(0, REST)[None, :]
        rest = is_head & (j < head_dim)
        weight_c = _weight(query_weight_ptr, key_weight_ptr, is_query, j, j < head_dim)
        sum_c = tl.zeros([HEADS, REST], tl.float32)
    for token in range(begin, tl.minimum(begin + part_tokens, tokens)):
        batch, position = token // seq, token % seq
        cos = _angles(cos_ptr, batch, position, cos_batch, cos_token, i, half)
        sin = _angles(sin_ptr, batch, position, sin_batch, sin_token, i, half)
        x = x_ptr + batch * x_batch + position * x_token + head.to(tl.int64) * x_head
        dy = dy_ptr + batch * dy_batch + position * dy_token + head.to(tl.int64) * dy_head
        dx = dx_ptr + (token * heads + head) * head_dim
        a, b = load_pairs(x, is_head, half, INTERLEAVED, HEADS, HALF)
        turned_a, turned_b = load_pairs(dy, is_head, half, INTERLEAVED, HEADS, HALF)
        grad_a, grad_b = turned_a * cos + turned_b * sin, turned_b * cos - turned_a * sin
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        products = tl.sum(a * (grad_a * weight_a), 1) + tl.sum(b * (grad_b * weight_b), 1)
        if REST:
            c, grad_c = _load(x + j, rest), _load(dy + j, rest)
            squares += tl.sum(c * c, 1)
            products += tl.sum(c * (grad_c * weight_c), 1)
        factor = 1.0 / tl.sqrt(squares / head_dim + fp32(eps))[:, None]
        mean = products[:, None] * factor / head_dim
        dx_a = _gradient(a, grad_a, weight_a, factor, mean)
        dx_b = _gradient(b, grad_b, weight_b, factor, mean)
        store_pairs(dx, dx_a, dx_b, is_head, half, INTERLEAVED, HEADS, HALF)
        # Where there is no head, an eps of 0 makes the factor infinite.
        factor = tl.where(is_head, factor, 0.0)
        sum_a += grad_a * (a * factor)
        sum_b += grad_b * (b * factor)
        if REST:
            dx_c = _gradient(c, grad_c, weight_c, factor, mean)
            tl.store(dx + j, dx_c.to(dx_ptr.dtype.element_ty), rest)
            sum_c += grad_c * (c * factor)
    if WEIGHT_GRAD:
        part_ptr += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * head_dim
        for which in tl.static_range(2):
            chosen = is_query if which == 0 else head >= num_heads
            of_a = tl.sum(tl.where(chosen, sum_a, 0.0), 0)[None, :]
            of_b = tl.sum(tl.where(chosen, sum_b, 0.0), 0)[None, :]
            store_pairs(part_ptr, of_a, of_b, True, half, INTERLEAVED, 1, HALF)
            if REST:
                of_c = tl.sum(tl.where(chosen, sum_c, 0.0), 0)[None, :]
                tl.store(part_ptr + j, of_c, j < head_dim)
            part_ptr += head_dim


# ---- launchers ------------------------------------------------------------------------------


def _tiles(x: Tensor, cos: Tensor, elements: int) -> dict[str, int]:
    rest = x.shape[3] - 2 * cos.shape[-1]
    HALF = triton.next_power_of_2(max(cos.shape[-1], 1))
    REST = triton.next_power_of_2(rest) if rest else 0
    heads = min(triton.next_power_of_2(x.shape[2]), max(1, elements // (2 * HALF + REST)))
    return {"HEADS": heads, "HALF": HALF, "REST": REST}


def qk_norm_rotary(
    x, query_weight, key_weight, cos, sin, num_heads: int, eps: float, interleaved: bool = False
) -> Tensor:
    y = contiguous_like(x)
    if not y.numel():
        return y
    x, cos, sin = with_dense_rows(x), with_dense_rows(cos), with_dense_rows(sin)
    batch, seq, heads, head_dim = x.shape
    tiles = _tiles(x, cos, _TILE)
    _forward[(batch * seq, triton.cdiv(heads, tiles["HEADS"]))](
        x, query_weight.contiguous(), key_weight.contiguous(), cos, sin, y, seq, heads, num_heads,
        head_dim, cos.shape[-1], float(eps), *x.stride()[:3], *angle_strides(cos, sin),
        INTERLEAVED=interleaved, **tiles,
    )  # fmt: skip
    return y


def qk_norm_rotary_backward(
    dy, x, query_weight, key_weight, cos, sin, num_heads: int, eps: float, interleaved: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = contiguous_like(x)
    batch, seq, heads, head_dim = x.shape
    width = head_dim if weight_grad else 0
    if not x.numel():
        return dx, x.new_zeros(width), x.new_zeros(width)
    dy, x, cos, sin = (with_dense_rows(t) for t in (dy, x, cos, sin))
    tiles = _tiles(x, cos, _TILE // 2)
    head_blocks = triton.cdiv(heads, tiles["HEADS"])
    part_tokens = triton.cdiv(batch * seq, _PARTS)
    parts = triton.cdiv(batch * seq, part_tokens)
    part = x.new_empty((parts * head_blocks, 2, width), dtype=torch.float32)
    _backward[(parts, head_blocks)](
        dy, x, query_weight.contiguous(), key_weight.contiguous(), cos, sin, dx, part, seq,
        batch * seq, part_tokens, heads, num_heads, head_dim, cos.shape[-1], float(eps),
        *dy.stride()[:3], *x.stride()[:3], *angle_strides(cos, sin),
        WEIGHT_GRAD=weight_grad, INTERLEAVED=interleaved, **tiles,
    )  # fmt: skip
    query_grad, key_grad = part.sum(0).to(x.dtype)
    return dx, query_grad, key_grad

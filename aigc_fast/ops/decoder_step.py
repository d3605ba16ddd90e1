"""One token for every sequence through all layers of a decoder with quantised weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._attention import reference as _attend
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._pages import NARROW, capacity_of, check_block_table
from aigc_fast.ops._quantized_format import TILE
from aigc_fast.ops._registry import FLOATS, define
from aigc_fast.ops.kv_cache import _reference as _append
from aigc_fast.ops.quantized_linear import _reference as _linear
from aigc_fast.ops.rms_norm import _reference as _norm
from aigc_fast.ops.rotary import _reference as _rotate

_GROUP_SIZE = 32
_LAYER = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")


def decoder_step(
    hidden: Tensor,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    scale: float | None = None,
    quantize_activations: bool = False,
    block_table: Tensor | None = None,
    cache_scales: Tensor | None = None,
) -> Tensor:
    """The normalised states after the last layer of a Llama-type decoder, for one new token each.

    For each layer x += output(attention(norm(x))), x += down(silu(gate(norm(x))) * up(norm(x))),
    the norms RMS norms, query and key rotated by halves; then the last norm.

    hidden:  (batch, hidden_size), the embedded tokens, float32, bfloat16 or float16 (float64 in
             the reference alone).
    weights: six tensors a layer, then the weight of the last norm (hidden_size,). Of a layer: the
             weight of the norm before attention, the packed weights of query, key and value (rows
             one after another) and of the output projection, the weight of the norm before the
             MLP, the packed weights of gate and up (one after the other) and of down. Norms have
             the dtype of hidden, packed weights come from `pack_weight` with groups of 32 columns
             and 4 or 8 bits.
    caches:  keys and values of each layer in turn, (batch, capacity, num_kv_heads, head_dim), all
             float32, bfloat16, float16, int8, float8_e4m3fn or float8_e5m2, of one layout; the new
             token's are written in place. With a block_table:
             (num_pages, page_size, num_kv_heads, head_dim).
    lengths: int32 (batch,), the entries there are, so the position of the new token; not changed.
    cos, sin: float32 (positions, head_dim / 2), of every position below capacity at least.
    eps:     added to the mean square in every norm.
    scale:   factor on the attention scores; None is 1 / sqrt(head_dim).
    quantize_activations: as for `quantized_linear`, in every product.
    block_table: int32 (batch, pages), as for `decode_attention`; capacity is pages * page_size.
             Sequences may share pages, but no two new tokens a slot. All are written before any
             is attended to: so the next tokens of one sequence, as guessed, can be rows of one
             call, with the same pages and lengths that go on.
    cache_scales: float32 (2 * layers, num_kv_heads), what the numbers of each head of each of the
             caches are to be multiplied by, as for `decode_attention`; None is 1.

    Returns (batch, hidden_size) in the dtype of hidden. Computes in fp32 throughout; key and value,
    divided by their scales, are rounded to the dtype of the caches, as are query and what attention
    gives where it has 16 bits. Bytes that must move: the
    weights once, the valid entries of the caches.

    On a CPU it is one parallel region for all layers. Elsewhere it is the layers' operators. The
    bits of a sequence depend neither on the batch it is in nor on pages.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and on the CPU for a length
    outside [0, capacity) or a page outside [0, num_pages), before anything is written; RuntimeError
    if a gradient is asked for.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or any(w.requires_grad for w in weights)):
        raise RuntimeError("decoder_step has no derivative: call it under torch.no_grad()")
    if scale is None:
        scale = caches[0].shape[3] ** -0.5
    return _decoder_step(
        hidden, weights, caches, lengths, cos, sin, eps, scale, quantize_activations, block_table,
        cache_scales,
    )  # fmt: skip


def _reference(
    hidden: Tensor, weights: Sequence[Tensor], caches: Sequence[Tensor], lengths: Tensor,
    cos: Tensor, sin: Tensor, eps: float, scale: float, quantize_activations: bool,
    block_table: Tensor | None = None, cache_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, _ = hidden.shape
    kv_heads, head_dim = caches[0].shape[2:]

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        rows = weight.shape[0] * TILE
        return _linear(x, weight, None, _bits(weight), _GROUP_SIZE, rows, quantize_activations)

    x, where = hidden, lengths.long()[:, None]
    for layer in range(len(weights) // len(_LAYER)):
        attention_norm, qkv, output, mlp_norm, gate_up, down = weights[6 * layer : 6 * layer + 6]
        keys, values = caches[2 * layer : 2 * layer + 2]
        heads = output.shape[1] * _GROUP_SIZE // head_dim
        packed = linear(_norm(x, attention_norm, eps), qkv)
        packed = packed[:, : (heads + 2 * kv_heads) * head_dim].view(batch, 1, -1, head_dim)
        query_key, value = packed.split([heads + kv_heads, kv_heads], 2)
        rotated = _rotate(query_key, cos[where], sin[where])
        dtype = x.dtype if keys.dtype in NARROW else keys.dtype
        query, key = rotated.to(dtype).split([heads, kv_heads], 2)
        of_heads: dict[str, Any] = {}
        if cache_scales is not None:
            key_scale, value_scale = cache_scales[2 * layer : 2 * layer + 2]
            of_heads = {"key_scale": key_scale, "value_scale": value_scale}
        _append(key, value.to(dtype), keys, values, lengths, block_table, **of_heads)
        out, _ = _attend(
            query, keys, values, lengths + 1, scale, block_table=block_table, **of_heads
        )
        x = x + linear(out.view(batch, -1).to(x.dtype), output)[:, : hidden.shape[1]]
        inner = down.shape[1] * _GROUP_SIZE
        gate, up = linear(_norm(x, mlp_norm, eps), gate_up).split(inner, 1)
        x = x + linear(F.silu(gate) * up, down)[:, : hidden.shape[1]]
    return _norm(x, weights[-1], eps)


def _bits(weight: Tensor) -> int:
    return 4 if weight.shape[2] < TILE * _GROUP_SIZE else 8


def _check(
    hidden: Tensor, weights: Sequence[Tensor], caches: Sequence[Tensor], lengths: Tensor,
    cos: Tensor, sin: Tensor, eps: float, scale: float, quantize_activations: bool,
    block_table: Tensor | None = None, cache_scales: Tensor | None = None,
) -> None:  # fmt: skip
    check_tensor("hidden", hidden, ndim=2)
    batch, width = hidden.shape
    layers, rest = divmod(len(weights), len(_LAYER))
    if layers == 0 or rest != 1:
        raise ValueError(f"weights must be 6 tensors a layer and one more, got {len(weights)}")
    if len(caches) != 2 * layers:
        raise ValueError(f"caches must hold {2 * layers} tensors, got {len(caches)}")
    check_tensor("caches[0]", caches[0], dtypes=(*FLOATS, *NARROW), ndim=4)
    check_device("caches[0]", caches[0], ("hidden", hidden))
    kv_heads, head_dim = caches[0].shape[2:]
    capacity = capacity_of(caches[0], block_table)
    if block_table is not None:
        check_block_table(block_table, ("hidden", hidden), ("caches[0]", caches[0]))
    elif caches[0].shape[0] != batch:
        raise ValueError(
            f"caches[0] must have the batch of hidden, {batch}, got {caches[0].shape[0]}"
        )
    if head_dim % 2 or head_dim == 0 or kv_heads == 0:
        raise ValueError(f"caches must have heads of an even size, got {tuple(caches[0].shape)}")
    for i, cache in enumerate(caches):
        check_tensor(f"caches[{i}]", cache, like=("caches[0]", caches[0]), shape=caches[0].shape)
        if cache.stride() != caches[0].stride() or (cache.stride(3) != 1 and cache.numel()):
            raise ValueError(
                f"caches[{i}] must have the strides of caches[0] and a contiguous last dimension, "
                f"got {cache.stride()}"
            )
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        if i % len(_LAYER) in (0, 3):
            check_tensor(name, weight, like=("hidden", hidden), shape=(width,))
        else:
            _check_packed(name, weight, hidden)
    for layer in range(layers):
        qkv, output, _, gate_up, down = weights[6 * layer + 1 : 6 * layer + 6]
        attended, inner = (w.shape[1] * _GROUP_SIZE for w in (output, down))
        if attended % (head_dim * kv_heads):
            raise ValueError(
                f"weights[{6 * layer + 2}] must take a multiple of {kv_heads} heads of {head_dim}, "
                f"got {attended} columns"
            )
        packed = attended + 2 * kv_heads * head_dim
        for i, weight, rows, columns in (
            (1, qkv, packed, width), (2, output, width, attended), (4, gate_up, 2 * inner, width),
            (5, down, width, inner),
        ):  # fmt: skip
            tiles, groups = -(-rows // TILE), columns // _GROUP_SIZE
            if weight.shape[:2] != (tiles, groups) or columns % _GROUP_SIZE:
                raise ValueError(
                    f"weights[{6 * layer + i}] ({_LAYER[i]}) must be ({rows}, {columns}) packed in "
                    f"groups of {_GROUP_SIZE}, got shape {tuple(weight.shape)}"
                )
    check_tensor("lengths", lengths, dtypes=(torch.int32,), shape=(batch,))
    if cache_scales is not None:
        shape = (2 * layers, kv_heads)
        check_tensor("cache_scales", cache_scales, dtypes=(torch.float32,), shape=shape)
        check_device("cache_scales", cache_scales, ("hidden", hidden))
    for name, angles in (("cos", cos), ("sin", sin)):
        check_tensor(name, angles, dtypes=(torch.float32,), ndim=2)
        if angles.shape[0] < capacity or angles.shape[1] != head_dim // 2:
            raise ValueError(
                f"{name} must have shape ({capacity} or more, {head_dim // 2}), "
                f"got {tuple(angles.shape)}"
            )


def _check_packed(name: str, weight: Tensor, hidden: Tensor) -> None:
    check_tensor(name, weight, dtypes=(torch.uint8,), ndim=3)
    sizes = [TILE * (_GROUP_SIZE * bits // 8 + more) for bits in (4, 8) for more in (2, 4)]
    if weight.shape[2] not in sizes:
        raise ValueError(f"{name} must have one of {sizes} bytes a block, got {weight.shape[2]}")
    if weight.device != hidden.device or not weight.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the device of hidden")


_decoder_step = define(
    "decoder_step(Tensor hidden, Tensor[] weights, Tensor(a!)[] caches, Tensor lengths, Tensor cos,"
    " Tensor sin, float eps, float scale, bool quantize_activations,"
    " Tensor? block_table=None, Tensor? cache_scales=None) -> Tensor",
    _reference,
    _check,
    stem=None,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)

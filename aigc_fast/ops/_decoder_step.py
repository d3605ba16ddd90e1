"""What decoder_step means, and the calls that it refuses."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._attention import reference as _attend
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._pages import NARROW, capacity_of, check_block_table
from aigc_fast.ops._quantized_format import TILE
from aigc_fast.ops._registry import FLOATS
from aigc_fast.ops.gated_mlp import _reference as _gate
from aigc_fast.ops.kv_cache import _reference as _append
from aigc_fast.ops.quantized_linear import _reference as _linear
from aigc_fast.ops.rms_norm import _reference as _norm
from aigc_fast.ops.rotary import _reference as _rotate

_GROUP_SIZE = 32


def reference(
    hidden: Tensor, weights: Sequence[Tensor], caches: Sequence[Tensor], lengths: Tensor,
    cos: Sequence[Tensor], sin: Sequence[Tensor], eps: float, scale: float,
    quantize_activations: bool, block_table: Tensor | None = None,
    cache_scales: Tensor | None = None, qkv_biases: Sequence[Tensor] | None = None,
    query_key_norms: Sequence[Tensor] | None = None, post_norms: Sequence[Tensor] | None = None,
    rotations: Sequence[int] = (), windows: Sequence[int] = (), softcap: float | None = None,
    residual_scale: float = 1.0, gelu: bool = False, routers: Sequence[Tensor] | None = None,
    experts_per_token: int = 0, normalize_experts: bool = True,
) -> Tensor:  # fmt: skip
    batch, width = hidden.shape
    kv_heads, head_dim = caches[0].shape[2:]
    where = lengths.long()[:, None]

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else _norm(x, weight, eps)

    def linear(x: Tensor, weight: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
        return _linear(x, weight, bias, _bits(weight), _GROUP_SIZE, rows, quantize_activations)

    def of_heads(x: Tensor, weight: Tensor) -> Tensor:
        return _norm(x.reshape(batch, -1, len(weight)), weight, eps).view_as(x)

    def mlp(x: Tensor, gate_up: Tensor, down: Tensor, factor: Any = 1) -> Tensor:
        inner = down.shape[1] * _GROUP_SIZE
        gate, up = linear(x, gate_up, 2 * inner).split(inner, 1)
        return linear(_gate(gate, up, gelu or None) * factor, down, width)

    x = hidden
    for layer in range(len(caches) // 2):
        attention_norm, qkv, output, mlp_norm, gate_up, down = _parts(weights, caches, layer)
        keys, values = caches[2 * layer : 2 * layer + 2]
        heads = output.shape[1] * _GROUP_SIZE // head_dim
        bias = None if qkv_biases is None else qkv_biases[layer]
        packed = linear(norm(x, attention_norm), qkv, (heads + 2 * kv_heads) * head_dim, bias)
        sizes = [heads, kv_heads, kv_heads]
        query, key, value = packed.view(batch, 1, -1, head_dim).split(sizes, 2)
        if query_key_norms is not None:
            query = of_heads(query, query_key_norms[2 * layer])
            key = of_heads(key, query_key_norms[2 * layer + 1])
        rotation = rotations[layer] if rotations else 0
        if rotation >= 0:
            angles = cos[rotation][where], sin[rotation][where]
            query, key = _rotate(query, *angles), _rotate(key, *angles)
        dtype = x.dtype if keys.dtype in NARROW else keys.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        options: dict[str, Any] = {"block_table": block_table}
        if cache_scales is not None:
            scales = cache_scales[2 * layer : 2 * layer + 2]
            options["key_scale"], options["value_scale"] = scales
        _append(key, value, keys, values, lengths, **options)
        window = windows[layer] or None if windows else None
        out, _ = _attend(query, keys, values, lengths + 1, scale, window, softcap, **options)
        after = (None, None) if post_norms is None else post_norms[2 * layer : 2 * layer + 2]
        branch = linear(out.view(batch, -1).to(x.dtype), output, width)
        x = x + norm(branch, after[0]) * residual_scale
        normed = norm(x, mlp_norm)
        if routers is None:
            branch = mlp(normed, gate_up, down)
        else:
            factors = _factors(normed, routers[layer], experts_per_token, normalize_experts)
            count, branch = factors.shape[1], torch.zeros_like(x)
            experts = zip(gate_up.chunk(count), down.chunk(count), factors.split(1, 1), strict=True)
            for of_expert in experts:
                branch = branch + mlp(normed, *of_expert)
        x = x + norm(branch, after[1]) * residual_scale
    return _norm(x, weights[-1], eps)


def _factors(x: Tensor, router: Tensor, per_token: int, normalize: bool) -> Tensor:
    """(batch, num_experts), zero for the experts that a token is not sent to."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factors, chosen = F.linear(x.to(wide), router.to(wide)).softmax(1).topk(per_token)
    if normalize:
        factors = factors / factors.sum(1, keepdim=True)
    return factors.new_zeros(len(x), len(router)).scatter(1, chosen, factors).to(x.dtype)


def _parts(
    weights: Sequence[Tensor], caches: Sequence[Tensor], layer: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Of a layer: the norm before attention, qkv, output, the norm before the MLP, gate and up,
    down; None for norms that there are not."""
    count = 2 * (len(weights) - 1) // len(caches)
    parts = weights[count * layer : count * (layer + 1)]
    if count == 6:
        return cast(Any, tuple(parts))
    return None, parts[0], parts[1], None, parts[2], parts[3]


def _bits(weight: Tensor) -> int:
    return 4 if weight.shape[2] < TILE * _GROUP_SIZE else 8


def check(
    hidden: Tensor, weights: Sequence[Tensor], caches: Sequence[Tensor], lengths: Tensor,
    cos: Sequence[Tensor], sin: Sequence[Tensor], eps: float, scale: float,
    quantize_activations: bool, block_table: Tensor | None = None,
    cache_scales: Tensor | None = None, qkv_biases: Sequence[Tensor] | None = None,
    query_key_norms: Sequence[Tensor] | None = None, post_norms: Sequence[Tensor] | None = None,
    rotations: Sequence[int] = (), windows: Sequence[int] = (), softcap: float | None = None,
    residual_scale: float = 1.0, gelu: bool = False, routers: Sequence[Tensor] | None = None,
    experts_per_token: int = 0, normalize_experts: bool = True,
) -> None:  # fmt: skip
    check_tensor("hidden", hidden, ndim=2)
    layers, rest = divmod(len(caches), 2)
    if layers == 0 or rest:
        raise ValueError(f"caches must hold 2 tensors a layer, got {len(caches)}")
    if len(weights) not in (6 * layers + 1, 4 * layers + 1):
        raise ValueError(
            f"weights must be 6 or 4 tensors for each of {layers} layers and one more, "
            f"got {len(weights)}"
        )
    _check_caches(hidden, caches, block_table)
    experts = _check_routers(hidden, routers, layers, experts_per_token)
    heads = _check_weights(hidden, weights, caches, experts)
    _, _, kv_heads, head_dim = caches[0].shape
    check_tensor("lengths", lengths, dtypes=(torch.int32,), shape=(len(hidden),))
    if cache_scales is not None:
        shape = (2 * layers, kv_heads)
        check_tensor("cache_scales", cache_scales, dtypes=(torch.float32,), shape=shape)
        check_device("cache_scales", cache_scales, ("hidden", hidden))
    _check_angles(cos, sin, capacity_of(caches[0], block_table), head_dim)
    packed = (heads + 2 * kv_heads) * head_dim
    per_head = [(head_dim,), (head_dim,)]
    if query_key_norms and query_key_norms[0].shape != (head_dim,):
        per_head = [(heads * head_dim,), (kv_heads * head_dim,)]
    width = (hidden.shape[1],)
    for name, tensors, shapes in (
        ("qkv_biases", qkv_biases, [(packed,)]),
        ("query_key_norms", query_key_norms, per_head),
        ("post_norms", post_norms, [width, width]),
    ):
        if tensors is not None:
            _check_count(name, tensors, layers * len(shapes))
            for i, t in enumerate(tensors):
                like = ("hidden", hidden)
                check_tensor(f"{name}[{i}]", t, like=like, shape=shapes[i % len(shapes)])
    for name, numbers, least, end in (
        ("rotations", rotations, -1, len(cos)), ("windows", windows, 0, 2**62),
    ):  # fmt: skip
        if numbers:
            _check_count(name, numbers, layers)
        for number in numbers:
            if not least <= number < end:
                raise ValueError(f"{name} must be in [{least}, {end}), got {number}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


def _check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name} must hold {count}, got {len(values)}")


def _check_caches(hidden: Tensor, caches: Sequence[Tensor], block_table: Tensor | None) -> None:
    check_tensor("caches[0]", caches[0], dtypes=(*FLOATS, *NARROW), ndim=4)
    check_device("caches[0]", caches[0], ("hidden", hidden))
    kv_heads, head_dim = caches[0].shape[2:]
    if block_table is not None:
        check_block_table(block_table, ("hidden", hidden), ("caches[0]", caches[0]))
    elif caches[0].shape[0] != len(hidden):
        raise ValueError(
            f"caches[0] must have the batch of hidden, {len(hidden)}, got {caches[0].shape[0]}"
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


def _check_routers(
    hidden: Tensor, routers: Sequence[Tensor] | None, layers: int, experts_per_token: int
) -> int:
    """The number of experts, 0 without any."""
    if routers is None:
        if experts_per_token != 0:
            raise ValueError(
                f"experts_per_token must be 0 without routers, got {experts_per_token}"
            )
        return 0
    _check_count("routers", routers, layers)
    shape = (len(routers[0]), hidden.shape[1])
    for i, router in enumerate(routers):
        check_tensor(f"routers[{i}]", router, like=("hidden", hidden), shape=shape)
    if not 0 < experts_per_token <= shape[0]:
        raise ValueError(f"experts_per_token must be in [1, {shape[0]}], got {experts_per_token}")
    return shape[0]


def _check_weights(
    hidden: Tensor, weights: Sequence[Tensor], caches: Sequence[Tensor], experts: int
) -> int:
    """The number of query heads."""
    width, (kv_heads, head_dim) = hidden.shape[1], caches[0].shape[2:]
    per_layer = 2 * (len(weights) - 1) // len(caches)
    norms = (0, 3) if per_layer == 6 else ()
    for i, weight in enumerate(weights):
        if i == len(weights) - 1 or i % per_layer in norms:
            check_tensor(f"weights[{i}]", weight, like=("hidden", hidden), shape=(width,))
        else:
            _check_packed(f"weights[{i}]", weight, hidden)
    heads = 0
    for first in range(0, len(weights) - 1, per_layer):
        places = [first + i for i in range(per_layer) if i not in norms]
        _, output, _, down = (weights[i] for i in places)
        attended, inner = (w.shape[1] * _GROUP_SIZE for w in (output, down))
        if attended % (head_dim * kv_heads) or (heads and attended != heads * head_dim):
            raise ValueError(
                f"weights[{places[1]}] must take a multiple of {kv_heads} heads of {head_dim}, the "
                f"same in all layers, got {attended} columns"
            )
        heads = attended // head_dim
        names = ("qkv", "output", "gate_up", "down")
        rows = (attended + 2 * kv_heads * head_dim, width, 2 * inner, width)
        if experts:
            if inner * 2 % TILE or width % TILE:
                raise ValueError(
                    f"experts must have multiples of {TILE} rows, got {2 * inner} and {width}"
                )
            rows = (*rows[:2], experts * 2 * inner, experts * width)
        for i, name, count, columns in zip(
            places, names, rows, (width, attended, width, inner), strict=True
        ):
            shape = (-(-count // TILE), columns // _GROUP_SIZE)
            if weights[i].shape[:2] != shape or columns % _GROUP_SIZE:
                raise ValueError(
                    f"weights[{i}] ({name}) must be ({count}, {columns}) packed in "
                    f"groups of {_GROUP_SIZE}, got shape {tuple(weights[i].shape)}"
                )
    return heads


def _check_packed(name: str, weight: Tensor, hidden: Tensor) -> None:
    check_tensor(name, weight, dtypes=(torch.uint8,), ndim=3)
    sizes = [TILE * (_GROUP_SIZE * bits // 8 + more) for bits in (4, 8) for more in (2, 4)]
    if weight.shape[2] not in sizes:
        raise ValueError(f"{name} must have one of {sizes} bytes a block, got {weight.shape[2]}")
    if weight.device != hidden.device or not weight.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the device of hidden")


def _check_angles(
    cos: Sequence[Tensor], sin: Sequence[Tensor], capacity: int, head_dim: int
) -> None:
    if not cos or len(cos) != len(sin):
        raise ValueError(f"cos and sin must be as many, got {len(cos)} and {len(sin)}")
    for name, tables in (("cos", cos), ("sin", sin)):
        for angles in tables:
            check_tensor(name, angles, dtypes=(torch.float32,), ndim=2)
            pairs = cos[0].shape[1]
            if len(angles) < capacity or angles.shape[1] != pairs or pairs > head_dim // 2:
                raise ValueError(
                    f"{name} must have shape ({capacity} or more, {head_dim // 2} or fewer), "
                    f"got {tuple(angles.shape)}"
                )

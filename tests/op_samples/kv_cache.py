import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.rotary import angles
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def _call(
    batch: int, q_len: int, capacity: int, heads: int, head_dim: int, positions: list[int]
) -> tuple[Tensor, ...]:
    shape = (heads, head_dim)
    return (
        rand(batch, q_len, *shape),
        rand(batch, q_len, *shape, seed=1),
        rand(batch, capacity, *shape, seed=2),
        rand(batch, capacity, *shape, seed=3),
        torch.tensor(positions, dtype=torch.int32),
    )


def _paged(
    name: str, q_len: int, pages: int, page_size: int, heads: int, head_dim: int,
    positions: list[int],
) -> Sample:  # fmt: skip
    """Pages in an order of their own, one of them unused; garbage where nothing is written."""
    batch = len(positions)
    key, value, _, _, at = _call(batch, q_len, 0, heads, head_dim, positions)
    caches = (rand(batch * pages + 1, page_size, heads, head_dim, seed=s) for s in (2, 3))
    order = torch.randperm(batch * pages + 1, generator=torch.Generator().manual_seed(0))
    table = order[1:].to(torch.int32).view(batch, pages)
    for b, position in enumerate(positions):
        table[b, : position // page_size] = 10**9
        table[b, (position + q_len - 1) // page_size + 1 :] = -1
    return Sample(name, (key, value, *caches, at), {"block_table": table})


def _with(
    sample: Sample, name: str, *, rotary: tuple[int, ...] | None = None,
    cache: torch.dtype | None = None, scales: bool = True, interleaved: bool = False,
) -> Sample:  # fmt: skip
    """The call with options. rotary: shape of the angles; cache: the dtype of narrow caches."""
    key, value, *caches, positions = sample.args
    options = dict(sample.kwargs)
    if rotary is not None:
        options["cos"], options["sin"] = angles(*rotary)
        if interleaved:
            options["interleaved"] = True
    if scales:
        unit = {torch.int8: 40.0, None: 0.5}.get(cache, 0.2)
        options["key_scale"] = rand(key.shape[2], seed=7).exp() / unit
        options["value_scale"] = rand(key.shape[2], seed=8).exp() / unit
    if cache is not None:
        caches = [(30 * c).to(cache) for c in caches]
    return Sample(name, (key, value, *caches, positions), options)


def _full_samples() -> list[Sample]:
    tokens = Sample("", _call(2, 3, 8, 2, 10, [1, 5]))
    wide = Sample("", _call(2, 2, 4, 3, 64, [2, 0]))
    pages = _paged("", 3, 4, 4, 2, 10, [0, 7])
    threads = _paged("", 50, 8, 7, 3, 64, [0, 3, 5, 1])
    odd = Sample("", _call(1, 2, 4, 2, 17, [2]))
    special = _call(1, 3, 3, 1, 6, [0])
    special[0][0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    special[1][0, 1, 0, :] = torch.tensor([1e30, -1e30, torch.nan, 0.0, -0.0, 1e-30])
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        _with(tokens, "rotary", rotary=(3, 5), scales=False),
        _with(tokens, "rotary_batched", rotary=(2, 3, 5), scales=False),
        _with(tokens, "rotary_partial", rotary=(3, 2), scales=False),
        _with(tokens, "rotary_none", rotary=(3, 0), scales=False),
        _with(wide, "rotary_pairs", rotary=(2, 2, 24), scales=False, interleaved=True),
        _with(odd, "rotary_pairs_odd", rotary=(2, 7), scales=False, interleaved=True),
        _with(pages, "rotary_pages", rotary=(2, 3, 5), scales=False),
        _with(tokens, "scaled"),
        _with(tokens, "int8", cache=torch.int8),
        _with(tokens, "int8_unscaled", cache=torch.int8, scales=False),
        _with(odd, "int8_odd", cache=torch.int8, rotary=(2, 8)),
        _with(wide, "e4m3", cache=e4m3),
        _with(odd, "e4m3_rotary", cache=e4m3, rotary=(1, 2, 5)),
        _with(tokens, "e5m2", cache=e5m2),
        _with(pages, "int8_everything", cache=torch.int8, rotary=(2, 3, 4), interleaved=True),
        _with(pages, "e5m2_pages", cache=e5m2, rotary=(3, 5)),
        _with(Sample("", special), "special_int8", cache=torch.int8, scales=False),
        _with(Sample("", special), "special_e4m3", cache=e4m3, scales=False),
        _with(Sample("", special), "special_e5m2", cache=e5m2, scales=False),
        _with(Sample("", _call(2, 0, 4, 1, 8, [4, 0])), "no_tokens_int8", cache=torch.int8),
        _with(threads, "threads_int8", cache=torch.int8, rotary=(50, 32)),
    ]


def _samples() -> list[Sample]:
    key, value, key_cache, value_cache, positions = _call(2, 3, 8, 2, 5, [1, 5])
    packed = rand(2, 3, 6, 5)
    layers = rand(4, 2, 8, 2, 5)  # (key or value of two layers, ...)
    by_head = rand(2, 2, 8, 5).transpose(1, 2)  # memory order (batch, heads, capacity, head_dim)
    return [
        Sample("tokens", (key, value, key_cache, value_cache, positions)),
        Sample("int64", (key, value, key_cache, value_cache, positions.long())),
        Sample("packed", (packed[:, :, 2:4], packed[:, :, 4:], key_cache, value_cache, positions)),
        Sample("layers", (key, value, layers[1], layers[3], positions)),
        Sample("by_head", (key, value, by_head, by_head.clone(), positions)),
        Sample("whole", _call(1, 4, 4, 3, 17, [0])),
        Sample("one", _call(3, 1, 9, 3, 64, [8, 0, 4])),
        Sample("no_tokens", _call(2, 0, 4, 1, 8, [4, 0])),
        Sample("no_batch", _call(0, 2, 4, 1, 8, [])),
        _paged("pages", 3, 4, 4, 2, 5, [0, 7]),
        _paged("pages_of_one", 2, 5, 1, 1, 8, [3, 0, 1]),
        _paged("pages_one_token", 1, 3, 16, 3, 64, [47, 0, 16]),
        _paged("page_of_all", 6, 1, 6, 1, 17, [0]),
        _paged("pages_threads", 50, 8, 7, 3, 64, [0, 3, 5, 1]),
        Sample("threads", _call(4, 50, 60, 3, 64, [0, 3, 9, 10])),
        *_full_samples(),
    ]


def _refusals() -> list[Refusal]:
    key, value, key_cache, value_cache, positions = good = _call(2, 3, 8, 2, 5, [1, 5])

    def bad(name: str, error: type[Exception], match: str, **changes: Tensor) -> Refusal:
        names = ("key", "value", "key_cache", "value_cache", "positions")
        args = tuple(changes.get(n, t) for n, t in zip(names, good, strict=True))
        return Refusal(name, args, error, match)

    table = torch.zeros(2, 1, dtype=torch.int32)

    def bad_table(name: str, error: type[Exception], match: str, table: Tensor) -> Refusal:
        return Refusal(name, good, error, match, {"block_table": table})

    def option(name: str, error: type[Exception], match: str, **kwargs: Tensor) -> Refusal:
        return Refusal(name, good, error, match, kwargs)

    cos, sin = angles(3, 2)
    return [
        option("sin", ValueError, "cos and sin must be given together", cos=cos),
        option("cos", TypeError, "cos must be float64, got float32", cos=cos.float(), sin=sin),
        option("cos_shape", ValueError, r"cos must have shape \(3, r / 2", cos=cos[:2], sin=sin),
        option("cos_wide", ValueError, "at most head_dim / 2 = 2", cos=angles(3, 3)[0], sin=sin),
        option("key_scale", ValueError, r"key_scale must have shape \(2,\)", key_scale=cos[0, :1]),
        option("scale_dtype", TypeError, "value_scale must be float64", value_scale=positions),
        bad("mixed", TypeError, "value_cache must have the dtype of key_cache",
            key_cache=key_cache.to(torch.int8)),
        bad_table("table_dtype", TypeError, "block_table must be int32", table.long()),
        bad_table("table_1d", ValueError, "block_table must have 2 dimensions", table[0]),
        bad_table("table_batch", ValueError, "block_table must have the batch of key", table[:1]),
        bad_table("no_pages", ValueError, "key must have at most capacity = 0", table[:, :0]),
        bad("dtype", TypeError, "key must be float64", key=key.int()),
        bad("dimensions", ValueError, "key must have 4 dimensions", key=key[0]),
        bad("value_dtype", TypeError, "value must have the dtype of key", value=value.half()),
        bad("value_shape", ValueError, r"value must have shape \(2, 3, 2, 5\)", value=value[:, :2]),
        bad("cache_dtype", TypeError, "key_cache must have the", key_cache=key_cache.half()),
        bad("cache_dim", ValueError, "key_cache must have 4 dim", key_cache=key_cache[0]),
        bad("cache_heads", ValueError, "key_cache must have shape", key_cache=key_cache[:, :, :1]),
        bad("capacity", ValueError, "value_cache must have shape", value_cache=value_cache[:, :7]),
        bad("expanded", ValueError, "key_cache must not be an expanded tensor",
            key_cache=key_cache[:, :1].expand(2, 8, 2, 5)),
        bad("too_long", ValueError, "key must have at most capacity = 2 tokens, got 3",
            key_cache=key_cache[:, :2], value_cache=value_cache[:, :2]),
        bad("positions_dtype", TypeError, "positions must be int32", positions=positions.short()),
        bad("positions_shape", ValueError, r"positions must have shape \(2,\)",
            positions=positions[:1]),
    ]  # fmt: skip


OPS = {
    "append_kv": OpSamples(
        ops.append_kv,
        _samples,
        _refusals,
        large=lambda: [
            Sample("1x1x3x64", _call(1, 1, 2048, 3, 64, [1000])),
            Sample("8x1x8x128", _call(8, 1, 2048, 8, 128, [100 * b for b in range(8)])),
            _with(
                Sample("", _call(8, 1, 2048, 8, 128, [100 * b for b in range(8)])),
                "8x1x8x128_rotary_int8",
                cache=torch.int8,
                rotary=(8, 1, 64),
            ),
            _with(
                Sample("", _call(1, 512, 2048, 8, 128, [0])),
                "1x512x8x128_rotary_int8",
                cache=torch.int8,
                rotary=(512, 64),
            ),
            Sample("1x512x8x128", _call(1, 512, 2048, 8, 128, [0])),
        ],
        derivatives=0,
        mutates=(2, 3),
    ),
}

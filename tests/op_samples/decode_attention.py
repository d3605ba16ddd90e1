import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def _call(
    name: str, batch: int, q_len: int, heads: int, kv_heads: int, head_dim: int, capacity: int,
    lengths: list[int], dtype: torch.dtype = torch.int32, *, page_size: int | None = None,
    per_head: tuple[str, ...] = (), cache: torch.dtype | None = None,
    mask: tuple[int, ...] | None = None, **kwargs: float,
) -> Sample:  # fmt: skip
    """per_head: options that are a number for each head. With a page_size the cache is cut into
    pages, in an order of their own, and the table holds garbage behind the lengths. `cache` is the
    one-byte dtype of the caches, which then have scales."""
    query = rand(batch, q_len, heads, head_dim)
    keys = rand(batch, capacity, kv_heads, head_dim, seed=1)
    values = rand(batch, capacity, kv_heads, head_dim, seed=2)
    options: dict = {name: rand(heads, seed=3 + i, scale=0.3) for i, name in enumerate(per_head)}
    if cache is not None:
        unit = 40 if cache == torch.int8 else 1
        keys, values = ((x * unit).clamp(-127, 127).to(cache) for x in (keys, values))
        options["key_scale"] = rand(kv_heads, seed=7).exp() / unit
        options["value_scale"] = rand(kv_heads, seed=8).exp() / unit
    if page_size is not None:
        keys, values, options["block_table"] = paged(keys, values, lengths, page_size)
    if mask is not None:
        options["mask"] = rand(*mask, seed=9) > 0
    args = (query, keys, values, torch.tensor(lengths, dtype=dtype))
    return Sample(name, args, {"return_lse": True, **kwargs, **options})


def paged(
    keys: Tensor, values: Tensor, lengths: list[int], page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(pages of keys, pages of values, block_table) that hold what the caches hold."""
    batch, capacity = keys.shape[:2]
    pages = -(-capacity // page_size)
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
    table = order.to(torch.int32).view(batch, pages)
    found = []
    for cache in (keys, values):
        garbage = 99 if cache.dtype == torch.int8 else torch.nan
        whole = torch.full((batch, pages * page_size, *cache.shape[2:]), garbage).to(cache.dtype)
        whole[:, :capacity] = cache
        stored = torch.empty_like(whole).view(batch * pages, page_size, *cache.shape[2:])
        stored[order] = whole.view_as(stored)
        found.append(stored)
    for sequence, length in enumerate(lengths):
        table[sequence, -(-length // page_size) :] = -(10**9)
    return *found, table


def _samples() -> list[Sample]:
    special = _call("special", 1, 1, 2, 2, 16, 4, [4])
    special.args[0][0, 0, 1, 5] = torch.nan
    no_pages = _call("no_pages", 2, 1, 2, 1, 8, 4, [0, 0], page_size=4)
    no_pages.kwargs["block_table"] = no_pages.kwargs["block_table"][:, :0]
    return [
        _call("grouped", 2, 1, 4, 2, 32, 40, [33, 17]),
        _call("multi_head", 2, 1, 3, 3, 16, 20, [20, 1], torch.int64),
        _call("multi_query", 1, 1, 8, 1, 64, 70, [65]),
        _call("group_of_three", 1, 1, 9, 3, 64, 37, [35]),
        _call("causal", 2, 5, 4, 2, 16, 12, [12, 7]),
        _call("causal_from_nothing", 2, 7, 2, 1, 8, 9, [7, 3]),
        _call("lengths_of_zero", 3, 2, 2, 1, 8, 5, [0, 5, 1]),
        _call("odd_head_dim", 1, 2, 3, 1, 17, 11, [11]),
        _call("head_dim_80", 1, 1, 4, 2, 80, 19, [18]),
        _call("head_dim_1", 1, 1, 2, 1, 1, 3, [3]),
        _call("scaled", 1, 1, 2, 1, 8, 33, [32], scale=-0.3),
        _call("two_splits", 1, 3, 2, 1, 8, 1025, [1025]),
        _call("no_capacity", 2, 1, 2, 1, 8, 0, [0, 0]),
        _call("no_queries", 2, 0, 2, 1, 8, 4, [4, 0]),
        _call("no_sequences", 0, 1, 2, 1, 8, 4, []),
        special,
        _call("head_dim_96", 1, 1, 4, 2, 96, 9, [9]),
        _call("head_dim_112", 2, 2, 2, 1, 112, 7, [7, 5]),
        _call("head_dim_256", 1, 1, 2, 1, 256, 5, [4]),
        _call("group_of_71", 1, 1, 71, 1, 64, 20, [19]),
        _call("window", 2, 1, 4, 2, 32, 40, [33, 5], window=7),
        _call("window_of_one", 2, 3, 2, 1, 8, 20, [20, 1], window=1),
        _call("window_causal", 2, 5, 6, 2, 16, 50, [50, 13], window=9),
        _call("window_wide", 1, 2, 2, 2, 8, 40, [40], window=2**40),
        _call("window_long", 1, 3, 2, 1, 8, 700, [690], window=600),
        # A chunk of rows that begins within a block, and units whose keys go on in the next.
        _call("window_chunks_and_splits", 1, 3, 16, 1, 8, 700, [700], window=400),
        _call("window_many_rows", 1, 70, 4, 2, 16, 100, [90], window=11),
        _call("softcap", 2, 1, 4, 2, 32, 40, [33, 0], softcap=1.5),
        _call("softcap_causal_window", 2, 4, 6, 2, 16, 45, [45, 8], softcap=30.0, window=12),
        _call("pages_of_one", 2, 1, 4, 2, 16, 9, [9, 4], page_size=1),
        _call("pages_of_three", 2, 2, 4, 2, 32, 50, [49, 0], page_size=3),
        _call("pages_of_16", 3, 1, 6, 2, 64, 48, [48, 17, 16], torch.int64, page_size=16),
        _call("page_of_all", 1, 1, 2, 1, 80, 40, [31], page_size=40),
        no_pages,
        _call("pages_window", 2, 3, 4, 2, 8, 70, [70, 66], page_size=5, window=13),
        _call("sinks", 2, 1, 4, 2, 16, 40, [33, 0], per_head=("sinks",)),
        _call("sinks_long", 1, 2, 3, 1, 8, 600, [600], per_head=("sinks",)),
        _call("alibi", 2, 3, 6, 3, 16, 40, [37, 2], per_head=("alibi_slopes",)),
        _call(
            "everything",
            2,
            5,
            6,
            2,
            40,
            70,
            [70, 33],
            page_size=4,
            window=29,
            softcap=3.0,
            scale=0.5,
            per_head=("sinks", "alibi_slopes"),
        ),
        _call("int8", 2, 1, 4, 2, 32, 40, [33, 17], cache=torch.int8),
        _call("int8_causal", 2, 4, 6, 2, 80, 40, [40, 2], cache=torch.int8),
        _call("int8_odd_head_dim", 1, 3, 3, 1, 17, 37, [37], cache=torch.int8),
        _call("int8_pages", 2, 1, 4, 2, 64, 50, [50, 9], cache=torch.int8, page_size=7),
        _call("e4m3", 2, 1, 4, 2, 64, 36, [33, 17], cache=torch.float8_e4m3fn),
        _call("e4m3_causal", 1, 3, 3, 3, 24, 300, [300], cache=torch.float8_e4m3fn),
        _call("e5m2", 2, 1, 2, 1, 40, 40, [40, 1], cache=torch.float8_e5m2),
        _call(
            "e5m2_everything",
            2,
            4,
            4,
            2,
            48,
            60,
            [60, 33],
            page_size=4,
            window=29,
            softcap=3.0,
            cache=torch.float8_e5m2,
            per_head=("sinks", "alibi_slopes"),
        ),
        _call("fixed_split", 2, 2, 4, 2, 32, 100, [100, 33], fixed_split=24),
        _call(
            "fixed_split_window",
            2,
            1,
            2,
            1,
            16,
            120,
            [120, 60],
            fixed_split=16,
            window=50,
            per_head=("sinks",),
        ),
        _call("mask", 2, 5, 4, 2, 32, 40, [33, 9], mask=(2, 5, 5)),
        _call("mask_shared", 2, 4, 3, 1, 16, 40, [40, 4], mask=(4, 4)),
        _call("mask_of_one", 2, 1, 4, 2, 16, 8, [8, 0], mask=(2, 1, 1)),
        _call("mask_from_nothing", 3, 7, 2, 1, 8, 9, [7, 3, 0], mask=(3, 7, 7)),
        _call("mask_window", 2, 5, 6, 2, 16, 50, [50, 13], mask=(5, 5), window=9),
        _call("mask_long", 1, 40, 4, 2, 16, 300, [290], mask=(1, 40, 40)),
        _call(
            "mask_everything",
            2,
            6,
            6,
            2,
            40,
            70,
            [70, 33],
            mask=(2, 6, 6),
            page_size=4,
            window=29,
            softcap=3.0,
            cache=torch.int8,
            per_head=("sinks", "alibi_slopes"),
        ),
        _call("many_rows", 1, 70, 4, 2, 40, 300, [290]),
    ]


def _refusals() -> list[Refusal]:
    args = _call("", 2, 1, 4, 2, 8, 6, [6, 3]).args
    query, keys, values, lengths = args

    def refusal(name: str, error: type[Exception], match: str, **change: Tensor) -> Refusal:
        named = dict(zip(("query", "keys", "values", "lengths"), args, strict=True)) | change
        return Refusal(name, tuple(named.values()), error, match)

    def option(name: str, error: type[Exception], match: str, **kwargs: object) -> Refusal:
        return Refusal(name, args, error, match, kwargs)

    table = torch.zeros(2, 3, dtype=torch.int32)
    integers = query.to(torch.int32)
    return [
        refusal("dtype", TypeError, "query must be float64", query=integers),
        refusal("key_dtype", TypeError, "key_cache must have the dtype", keys=keys.float()),
        refusal("value_dtype", TypeError, "value_cache must have the dtype", values=values.float()),
        refusal("query_3d", ValueError, "query must have 4 dimensions", query=query[0]),
        refusal("key_3d", ValueError, "key_cache must have 4 dimensions", keys=keys[0]),
        refusal("value_shape", ValueError, "value_cache must have shape", values=values[:, :5]),
        refusal("batch", ValueError, "key_cache must have the batch", query=rand(3, 1, 4, 8)),
        refusal("head_dim", ValueError, "key_cache must have the head_dim", query=rand(2, 1, 4, 7)),
        refusal("heads", ValueError, "query must have a multiple", query=rand(2, 1, 3, 8)),
        refusal(
            "lengths_dtype", TypeError, "cache_lengths must be int32", lengths=lengths.double()
        ),
        refusal(
            "lengths_shape",
            ValueError,
            r"cache_lengths must have shape \(2,\)",
            lengths=lengths[:1],
        ),
        option("window", ValueError, "window must be at least 1, got 0", window=0),
        option("softcap", ValueError, "softcap must be positive, got -1.0", softcap=-1.0),
        option("softcap_nan", ValueError, "softcap must be positive", softcap=float("nan")),
        option("table_dtype", TypeError, "block_table must be int32", block_table=table.long()),
        option("table_1d", ValueError, "block_table must have 2 dimensions", block_table=table[0]),
        option("table_batch", ValueError, "block_table must have the batch", block_table=table[:1]),
        option("sinks", ValueError, r"sinks must have shape \(4,\)", sinks=rand(3)),
        option("sinks_dtype", TypeError, "sinks must be float64", sinks=lengths),
        option("slopes", ValueError, r"alibi_slopes must have shape \(4,\)", alibi_slopes=rand(1)),
        option("key_scale", ValueError, r"key_scale must have shape \(2,\)", key_scale=rand(4)),
        option("value_scale", TypeError, "value_scale must be float64", value_scale=lengths),
        option("mask", TypeError, "mask must be bool", mask=rand(1, 1)),
        option(
            "mask_shape",
            ValueError,
            r"mask must have shape \(1, 1\) or \(2, 1, 1\)",
            mask=torch.ones(1, 2, dtype=torch.bool),
        ),
        option("fixed_split", ValueError, "fixed_split must be at least 1", fixed_split=0),
        refusal("int_cache", TypeError, "key_cache must have the dtype", keys=keys.to(torch.int16)),
        refusal(
            "mixed_caches",
            TypeError,
            "value_cache must have the dtype of key_cache",
            keys=keys.to(torch.int8),
        ),
        Refusal(
            "no_page",
            (query, keys[:0], values[:0], lengths),
            ValueError,
            "key_cache must have at least one page",
            {"block_table": table},
        ),
    ]


OPS = {
    "decode_attention": OpSamples(
        ops.decode_attention,
        _samples,
        _refusals,
        large=lambda: [
            _call("b8_2048_h32_kv8_d128", 8, 1, 32, 8, 128, 2048, [2048] * 8),
            _call("b1_8192_h32_kv8_d128", 1, 1, 32, 8, 128, 8192, [8192]),
            _call("b1_512_h9_kv3_d64", 1, 1, 9, 3, 64, 512, [512]),
        ],
        derivatives=0,
    ),
}

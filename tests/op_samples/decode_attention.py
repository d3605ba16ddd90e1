import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def _call(
    name: str, batch: int, q_len: int, heads: int, kv_heads: int, head_dim: int, capacity: int,
    lengths: list[int], dtype: torch.dtype = torch.int32, **kwargs: float,
) -> Sample:  # fmt: skip
    query = rand(batch, q_len, heads, head_dim)
    keys = rand(batch, capacity, kv_heads, head_dim, seed=1)
    values = rand(batch, capacity, kv_heads, head_dim, seed=2)
    args = (query, keys, values, torch.tensor(lengths, dtype=dtype))
    return Sample(name, args, {"return_lse": True, **kwargs})


def _samples() -> list[Sample]:
    special = _call("special", 1, 1, 2, 2, 16, 4, [4])
    special.args[0][0, 0, 1, 5] = torch.nan
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
        _call("many_rows", 1, 70, 4, 2, 40, 300, [290]),
    ]


def _refusals() -> list[Refusal]:
    args = _call("", 2, 1, 4, 2, 8, 6, [6, 3]).args
    query, keys, values, lengths = args

    def refusal(name: str, error: type[Exception], match: str, **change: Tensor) -> Refusal:
        named = dict(zip(("query", "keys", "values", "lengths"), args, strict=True)) | change
        return Refusal(name, tuple(named.values()), error, match)

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

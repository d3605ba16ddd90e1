import torch

from aigc_fast import ops
from tests.op_samples.rotary import angles
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: (batch, seq, query heads, key heads, head_dim): decoding, prompts and images of Qwen3 and Wan
SHAPES = [(1, 1, 16, 8, 128), (8, 1, 16, 8, 128), (1, 512, 16, 8, 128), (1, 4096, 12, 12, 128)]


def _call(
    name: str, batch: int, seq: int, heads: int, kv_heads: int, head_dim: int,
    rotary: tuple[int, ...], differentiable: bool = True, **options: float,
) -> Sample:  # fmt: skip
    # Values lie behind the query and key heads of the same packed projection.
    packed = rand(batch, seq, heads + 2 * kv_heads, head_dim)[:, :, : heads + kv_heads]
    weights = rand(head_dim, seed=1), rand(head_dim, seed=2)
    args = (packed, *weights, *angles(*rotary), heads)
    return Sample(name, args, options, differentiable)


def _samples() -> list[Sample]:
    special = _call("special", 1, 5, 1, 1, 6, (5, 3), False)
    x = special.args[0]
    x[0, 0, 0, 1], x[0, 1, 1, 2], x[0, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    x[0, 3], x[0, 4, 0] = 0, 1e-30
    return [
        _call("halves", 2, 3, 2, 1, 8, (3, 4)),
        _call("pairs", 2, 3, 2, 1, 8, (3, 4), interleaved=True),
        _call("batched", 2, 2, 2, 2, 6, (2, 2, 3)),
        _call("partial", 1, 3, 2, 1, 11, (3, 3)),
        _call("partial_pairs", 1, 3, 1, 2, 11, (3, 4), interleaved=True),
        _call("none", 1, 2, 1, 1, 5, (2, 0)),
        _call("only_query", 1, 2, 3, 0, 4, (2, 2)),
        _call("only_key", 1, 2, 0, 2, 4, (2, 2)),
        _call("eps", 1, 2, 2, 1, 4, (2, 2), eps=0.1),
        _call("no_eps", 1, 2, 3, 2, 4, (2, 2), eps=0.0),
        _call("no_tokens", 2, 0, 2, 1, 6, (0, 3)),
        _call("no_heads", 2, 3, 0, 0, 6, (3, 3)),
        special,
        _call("odd", 1, 3, 2, 1, 254, (3, 127), False),
        _call("many_heads", 1, 2, 33, 3, 64, (2, 32), False),
        _call("threads", 2, 67, 9, 3, 64, (67, 32), False),
        _call("threads_pairs", 2, 67, 9, 3, 64, (2, 67, 20), False, interleaved=True),
    ]


def _refusals() -> list[Refusal]:
    good = _call("", 2, 3, 4, 2, 10, (3, 5)).args
    names = ("query_key", "query_weight", "key_weight", "cos", "sin", "num_heads")

    def bad(name: str, error: type[Exception], match: str, **changes: object) -> Refusal:
        args = tuple(changes.get(n, x) for n, x in zip(names, good, strict=True))
        return Refusal(name, args, error, match)

    x, weight, _, cos, sin, _ = good
    return [
        bad("dtype", TypeError, "query_key must be float64", query_key=x.int()),
        bad("dimensions", ValueError, "query_key must have 4 dimensions", query_key=x[0]),
        bad("weight", ValueError, r"query_weight must have shape \(10,\)", query_weight=weight[1:]),
        bad("weight_dtype", TypeError, "key_weight must have the dtype", key_weight=weight.half()),
        bad("cos_dtype", TypeError, "cos must be float64", cos=cos.float()),
        bad("cos_shape", ValueError, r"cos must have shape \(3, r / 2\)", cos=cos[:2]),
        bad("sin_shape", ValueError, r"sin must have shape \(3, 5\)", sin=sin[:, :4]),
        bad("num_heads", ValueError, r"num_heads must be in \[0, 6\], got 7", num_heads=7),
        bad("negative", ValueError, r"num_heads must be in \[0, 6\], got -1", num_heads=-1),
    ]


OPS = {
    "qk_norm_rotary": OpSamples(
        ops.qk_norm_rotary,
        _samples,
        _refusals,
        large=lambda: [
            _call("x".join(map(str, (b, s, h + k, d))), b, s, h, k, d, (s, d // 2))
            for b, s, h, k, d in SHAPES
        ],
        constants=(3, 4),
    ),
}

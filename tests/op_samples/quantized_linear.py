import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def _call(
    rows: tuple[int, ...], out_features: int, in_features: int, bits: int,
    group_size: int | None, symmetric: bool = True, bias: bool = False, **options: bool,
) -> tuple[tuple, dict]:  # fmt: skip
    weight = ops.quantize_weight(
        rand(out_features, in_features, scale=0.1), bits, group_size, symmetric=symmetric
    )
    padded = -(-in_features // (32 // bits)) * (32 // bits)
    kwargs = dict(bits=bits, group_size=group_size or padded, out_features=out_features, **options)
    x = rand(*rows, in_features, seed=1)
    return (x, weight, rand(out_features, seed=2) if bias else None), kwargs


def _samples() -> list[Sample]:
    named = {
        "q4_0": _call((1,), 32, 64, 4, 32),
        "q4_1": _call((3,), 48, 96, 4, 32, symmetric=False),
        "q8_0": _call((2, 2), 32, 64, 8, 32),
        "bias_tail": _call((1,), 17, 64, 4, 32, bias=True),
        "group_64": _call((2,), 16, 128, 4, 64),
        "group_128": _call((5,), 16, 256, 4, 128, symmetric=False),
        "per_channel": _call((3,), 33, 64, 8, None),
        "per_channel_odd": _call((2,), 5, 37, 8, None, bias=True),
        "int8_minimum": _call((1,), 16, 64, 8, 32, symmetric=False),
        "many_rows": _call((15,), 16, 64, 4, 32, symmetric=False),
        "one": _call((1,), 1, 8, 4, 8),
        "no_rows": _call((0,), 16, 32, 4, 32),
        "threads": _call((1,), 2048, 192, 4, 32),
        "wide": _call((1,), 16, 1024, 4, 32, symmetric=False),
        "four_wide": _call((4,), 16, 1024, 4, 32),
        "eight_wide": _call((8,), 33, 200, 8, 40, symmetric=False, bias=True),
        "prompt": _call((70,), 80, 64, 4, 32, symmetric=False, bias=True),
        "prompt_odd": _call((2, 35), 33, 37, 8, None, bias=True),
    }
    for name in ("q4_0", "q4_1", "q8_0", "per_channel_odd", "many_rows", "threads", "prompt"):
        args, kwargs = named[name]
        named[f"{name}_int8"] = args, {**kwargs, "quantize_activations": True}
    samples = [Sample(name, *call) for name, call in named.items()]
    (x, weight, bias), kwargs = named["q4_0"]
    zeros = torch.cat([torch.zeros(1, 32, dtype=x.dtype), x[:, 32:]], 1)
    special = torch.cat([x, x, x])
    special[0, 5], special[1, 40] = torch.nan, torch.inf
    strided = rand(4, 128)[::2, ::2]
    return [
        *samples,
        Sample("special_int8", (special, weight, bias), {**kwargs, "quantize_activations": True}),
        Sample("zeros_int8", (zeros, weight, bias), {**kwargs, "quantize_activations": True}),
        Sample("strided", (strided, weight, bias), kwargs),
    ]


def _refusals() -> list[Refusal]:
    (x, weight, _), kwargs = _call((2,), 32, 64, 4, 32)
    one_group = _call((2,), 32, 32, 4, 32)[0][1]

    def bad(name: str, error: type[Exception], match: str, *args: Tensor, **changes) -> Refusal:
        return Refusal(name, args or (x, weight, None), error, match, {**kwargs, **changes})

    return [
        bad("dtype", TypeError, "x must be float64", x.int(), weight, None),
        bad("bits", ValueError, "bits must be 4 or 8, got 3", bits=3),
        bad("group", ValueError, "group_size must be a multiple of 8", group_size=12),
        bad("out", ValueError, "out_features must be positive", out_features=0),
        bad("weight_dtype", TypeError, "weight must be uint8", x, weight.int(), None),
        bad("weight_dim", ValueError, "weight must have 3 dimensions", x, weight[0], None),
        bad("no_groups", ValueError, "weight must have shape", x[:, :0], weight[:, :0], None),
        bad("tiles", ValueError, r"weight must have shape \(3, groups", out_features=33),
        bad("bytes", ValueError, "weight must have shape", x, weight[..., 1:], None),
        bad("in_features", ValueError, "x must have the in_features", x[:, :32], weight, None),
        bad("part_of_a_group", ValueError, "of weight, 64, got 60", x[:, :60], weight, None),
        bad("one_group", ValueError, "of weight, 25 to 32, got 24", x[:, :24], one_group, None),
        bad("other_width", ValueError, "x must have in_features = 31 last", in_features=31),
        bad("scalar", ValueError, "x must have the in_features", x[0, 0], weight, None),
        bad("bias_shape", ValueError, r"bias must have shape \(32,\)", x, weight, x[0, :31]),
        bad("bias_dtype", TypeError, "bias must have the dtype", x, weight, x[0, :32].half()),
    ]


OPS = {
    "quantized_linear": OpSamples(
        ops.quantized_linear,
        _samples,
        _refusals,
        large=lambda: [
            Sample(
                name, *_call(rows, n, k, bits, 32, symmetric=bits == 8, quantize_activations=True)
            )
            for name, rows, n, k, bits in [
                ("1x4096x4096_q4", (1,), 4096, 4096, 4),
                ("8x4096x4096_q4", (8,), 4096, 4096, 4),
                ("1x4096x4096_q8", (1,), 4096, 4096, 8),
                ("512x1536x576_q4", (512,), 1536, 576, 4),
            ]
        ],
        derivatives=0,
    ),
}

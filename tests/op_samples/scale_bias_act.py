import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _call(name: str, n: int, c: int, *spatial: int, samples: int | None = None, **kwargs) -> Sample:
    """A call with everything; the noise is of one sample where `samples` is 1."""
    noise = rand(n if samples is None else samples, 1, *spatial, seed=2)
    parameters = rand(n, c, seed=1), noise, rand(1, seed=3), rand(c, seed=4)
    x = rand(n, c, *spatial)
    x = channels_last(x) if name.startswith("channels_last") else x
    return Sample(name, (x, *parameters, "lrelu"), kwargs, x.numel() < 2000)


def _samples() -> list[Sample]:
    x, scale, bias = rand(2, 5, 3, 7), rand(2, 5, seed=1), rand(5, seed=4)
    special = rand(1, 3, 4)
    special[0, 0, 1], special[0, 1, 2], special[0, 2, 3] = torch.nan, torch.inf, -torch.inf
    last = channels_last(x)
    return [
        _call("all", 2, 5, 3, 7, clamp=0.9),
        Sample("scale", (x, scale)),
        Sample("bias_relu", (x, None, None, None, bias, "relu"), {"gain": -0.7}),
        Sample("noise", (x, None, rand(1, 1, 3, 7), None, None, "lrelu", -0.3)),
        Sample("smooth", (x, scale, rand(1, 1, 3, 7), rand(), bias, "swish"), {"clamp": 1.0}),
        Sample("line", (rand(3, 2, 33), rand(3, 2, seed=1), None, None, rand(2), "lrelu")),
        Sample("volume", (rand(2, 3, 2, 3, 4), rand(2, 3), rand(2, 1, 2, 3, 4), rand(1, 1))),
        Sample("vectors", (rand(4, 17), rand(4, 17, seed=1), rand(4, 1), None, rand(17, seed=4))),
        _call("channels_last", 2, 18, 3, 5, samples=1),
        Sample("channels_last_scale", (last, scale)),
        _call("empty", 2, 3, 0, 4),
        _call("no_samples", 0, 3, 2, 2),
        Sample("special", (special, rand(1, 3), None, None, rand(3), "relu"), {}, False),
        _call("long_rows", 1, 2, 33, 515),
        _call("channels_last_blocks", 2, 200, 13, 13),
    ]  # fmt: skip


def _refusals() -> list[Refusal]:
    x, scale, noise, bias = rand(2, 4, 3, 5), rand(2, 4), rand(2, 1, 3, 5), rand(4)
    return [
        Refusal("dtype", (x.int(), scale), TypeError, "x must be float64"),
        Refusal("vector", (bias,), ValueError, "x must have at least 2 dimensions"),
        Refusal("scale", (x, rand(1, 4)), ValueError, r"scale must have shape \(2, 4\)"),
        Refusal("scale_dtype", (x, scale.float()), TypeError, "scale must be float64, got float32"),
        Refusal("wider", (x.float(), scale), TypeError, "scale must be float32, bfloat16, float16"),
        Refusal("noise", (x, None, noise[..., :4]), ValueError, r"noise must have shape \(2, 1, 3"),
        Refusal(
            "strength", (x, None, noise, rand(2)), ValueError, r"strength must have shape \(\)"
        ),
        Refusal("no_noise", (x, None, None, rand(1)), ValueError, "strength must be None where"),
        Refusal("bias", (x, None, None, None, rand(5)), ValueError, r"bias must have shape \(4,\)"),
        Refusal("act", (x, scale), ValueError, "act must be one of", {"act": "gelu"}),
    ]


OPS = {
    "scale_bias_act": OpSamples(
        ops.scale_bias_act,
        _samples,
        _refusals,
        large=lambda: [
            Sample("prologue_8x256x64x64", (rand(8, 256, 64, 64), rand(8, 256))),
            Sample(
                "epilogue_8x256x64x64",
                (
                    rand(8, 256, 64, 64),
                    rand(8, 256),
                    rand(8, 1, 64, 64),
                    rand(1),
                    rand(256),
                    "lrelu",
                ),
            ),
        ],
        constants=(2,),
    ),
}

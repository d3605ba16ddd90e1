import torch

from aigc_fast import ops
from aigc_fast.ops._activations import ACTIVATIONS
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _samples() -> list[Sample]:
    samples = [
        Sample(f"{act}_clamp", (rand(2, 5, 3, 7), rand(5, seed=1), 1, act), {"clamp": 0.9})
        for act in ACTIVATIONS
    ]
    samples += [
        Sample(act, (rand(3, 17, seed=2), rand(17, seed=3), 1, act), {}) for act in ACTIVATIONS
    ]
    special = torch.tensor([0.0, -0.0, 1e-30, -88.0, 89.0, 1e4, torch.inf, -torch.inf, torch.nan])
    samples += [
        Sample(f"special_{act}", (special.double(), None, 0, act), differentiable=False)
        for act in ACTIVATIONS
    ]
    samples += [
        Sample("channels_last", (channels_last(rand(2, 6, 5, 3)), rand(6), 1, "lrelu")),
        Sample("last_dim", (rand(4, 3, 127), rand(127), -1, "swish")),
        Sample("first_dim", (rand(3, 11), rand(3), 0, "tanh")),
        Sample("no_bias", (rand(1025), None, 0, "lrelu"), {"gain": 0.5, "alpha": 0.1}),
        Sample("negative_gain", (rand(2, 3, 4), rand(3), 1, "lrelu"), {"gain": -1.5, "clamp": 1.0}),
        Sample("negative_slope", (rand(2, 3, 4), rand(3), 1, "lrelu"), {"alpha": -0.3}),
        Sample("empty", (rand(0, 4, 2), rand(4), 1, "relu")),
        Sample("no_channels", (rand(3, 0), rand(0), 1, "swish")),
        Sample("one", (rand(1, 1), rand(1), 1, "elu"), {"alpha": 0.7}),
        Sample("one_without_bias", (rand(1), None, 0, "tanh")),
        Sample("many_rows", (rand(700, 31), rand(31), 1, "sigmoid"), differentiable=False),
        Sample("long_row", (rand(1, 2, 17000), rand(2), 1, "lrelu"), differentiable=False),
    ]
    return samples


def _refusals() -> list[Refusal]:
    x, b = rand(2, 4), rand(4)
    return [
        Refusal("act", (x, b, 1, "gelu"), ValueError, "act must be one of linear"),
        Refusal("dtype", (x.to(torch.int32), None), TypeError, "x must be float64"),
        Refusal("bias_dtype", (x, b.float()), TypeError, "bias must have the dtype of x"),
        Refusal("bias_shape", (x, rand(3)), ValueError, r"bias must have shape \(4,\)"),
        Refusal("bias_2d", (x, rand(1, 4)), ValueError, r"bias must have shape \(4,\)"),
        Refusal("dim", (x, b, 2), ValueError, "dim must be a dimension of x"),
        Refusal("alpha", (x, b, 1, "relu", 0.1), ValueError, "alpha must be None"),
        Refusal("sparse", (x.to_sparse(), None), TypeError, "x must be a strided tensor"),
    ]


OPS = {
    "bias_act": OpSamples(
        ops.bias_act,
        _samples,
        _refusals,
        large=lambda: [
            Sample(
                "64x512x32x32",
                (rand(64, 512, 32, 32), rand(512), 1, "lrelu"),
                {"clamp": 256.0},
            )
        ],
    ),
}

import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    """Near 1 and above 0: what alpha and beta are."""
    return 0.3 + rand(*shape, seed=seed).abs()


def _samples() -> list[Sample]:
    a, b = positive(5), positive(5, seed=1)
    special = torch.tensor([0.0, -0.0, 1e-30, 3e4, 1e6, torch.inf, -torch.inf, torch.nan])
    return [
        Sample("audio", (rand(2, 5, 37), a, b)),
        Sample("tied", (rand(2, 5, 7), a)),
        Sample("log_scale", (rand(2, 5, 7), rand(5), rand(5, seed=1)), {"log_scale": True}),
        Sample("matrix", (rand(6, 5), a, b)),
        Sample("image", (rand(2, 5, 3, 4), a, b)),
        Sample("channels_last", (channels_last(rand(2, 5, 3, 4)), a, b)),
        # alpha x up to 200: many periods
        Sample("many_periods", (rand(1, 5, 33, scale=40.0), a, b), differentiable=False),
        Sample("special", (special.double().expand(2, 5, 8), a, b), differentiable=False),
        Sample("zero_alpha", (rand(2, 3, 4), torch.zeros(3).double(), positive(3))),
        Sample("empty", (rand(0, 5, 4), a, b)),
        Sample("no_channels", (rand(3, 0, 2), rand(0), rand(0))),
        Sample("one", (rand(1, 1, 1), positive(1), positive(1))),
        Sample("long_row", (rand(1, 2, 9001), positive(2), positive(2)), differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x, a = rand(2, 4, 3), positive(4)
    return [
        Refusal("dtype", (x.to(torch.int32), a), TypeError, "x must be float64"),
        Refusal("dims", (x[0, 0], a), ValueError, "x must have at least 2 dimensions"),
        Refusal("alpha_dtype", (x, a.float()), TypeError, "alpha must have the dtype of x"),
        Refusal("alpha_shape", (x, positive(3)), ValueError, r"alpha must have shape \(4,\)"),
        Refusal("beta_shape", (x, a, a[:, None]), ValueError, r"beta must have shape \(4,\)"),
    ]


OPS = {
    "snake": OpSamples(
        ops.snake,
        _samples,
        _refusals,
        large=lambda: [
            Sample("2x256x32768", (rand(2, 256, 32768), positive(256), positive(256, seed=1)))
        ],
    ),
}

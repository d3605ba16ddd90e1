from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand
from tests.op_samples.snake import positive


def _low_pass(seed: int) -> Tensor:
    """A filter that is not symmetric, whose taps have the sum 1."""
    taps = rand(12, seed=seed).abs()
    return taps / taps.sum()


def channels_innermost(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _samples() -> list[Sample]:
    # Of many channels: the gradients of alpha and beta are compared by their largest error, which
    # over a few is a matter of luck.
    a, b = positive(24), positive(24, seed=1)
    taps = _low_pass(0), _low_pass(1)
    return [
        Sample("audio", (rand(1, 24, 17), a, b)),
        Sample("filters", (rand(2, 24, 5), a, b, *taps)),
        Sample("tied_log_scale", (rand(1, 24, 9), rand(24, scale=0.5)), {"log_scale": True}),
        Sample("one_sample", (rand(1, 24, 1), a, b, *taps)),
        Sample("two_samples", (rand(1, 24, 2), a, b, *taps)),
        Sample("many_periods", (rand(1, 3, 33, scale=40.0), a[:3], b[:3]), differentiable=False),
        Sample("empty", (rand(0, 24, 4), a, b)),
        Sample("tiles", (rand(1, 2, 1543), a[:2], b[:2]), differentiable=False),
        *_channels_innermost(),
    ]


def _channels_innermost() -> list[Sample]:
    """Fewer channels than a vector has, some blocks of them, and tiles of either."""
    samples = [
        Sample(
            f"channels_innermost_{n}x{c}x{t}",
            (channels_innermost(rand(n, c, t)), positive(c), positive(c, seed=1)),
            differentiable=c * t < 500,
        )
        for n, c, t in [(2, 24, 9), (1, 5, 7), (2, 3, 1), (1, 24, 2), (2, 77, 130), (1, 150, 133)]
    ]
    x, a, b = rand(1, 3, 4000, scale=30.0), positive(3), positive(3, seed=1)
    x[:, 1, ::70] *= 1000  # beyond what the vectors' sine takes, beside what it does
    many = Sample("channels_innermost_large", (channels_innermost(x), a, b), differentiable=False)
    return [*samples, many]


def _refusals() -> list[Refusal]:
    x, a = rand(2, 4, 9), positive(4)
    return [
        Refusal("dtype", (x.int(), a), TypeError, "x must be float64"),
        Refusal("dims", (x[0], a), ValueError, "x must have 3 dimensions"),
        Refusal("no_samples", (x[..., :0], a), ValueError, "x must have at least one sample"),
        Refusal("alpha_shape", (x, positive(3)), ValueError, r"alpha must have shape \(4,\)"),
        Refusal("beta_dtype", (x, a, a.float()), TypeError, "beta must have the dtype of x"),
        Refusal("up", (x, a, a, rand(11)), ValueError, r"up_filter must have shape \(12,\)"),
        Refusal("down", (x, a, a, None, a.int()), TypeError, "down_filter must be float64"),
    ]


OPS = {
    "alias_free_snake": OpSamples(
        ops.alias_free_snake,
        _samples,
        _refusals,
        large=lambda: [
            Sample("2x256x32768", (rand(2, 256, 32768), positive(256), positive(256, seed=1)))
        ],
        constants=(3, 4),
    ),
}

import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _low_pass(*shape: int, seed: int = 0) -> Tensor:
    """A filter that is not symmetric, whose taps have the sum 1."""
    taps = rand(*shape, seed=seed).abs()
    return taps / taps.sum()


def _samples() -> list[Sample]:
    x, b = rand(2, 3, 5, 6), rand(3)
    u, d = _low_pass(6), _low_pass(6, seed=1)
    u2, d2 = _low_pass(4, 3), _low_pass(3, 5)
    twice = {"up": 2, "down": 2, "padding": (6, 5, 5, 6)}
    return [
        Sample("separable", (x, u, d, b), twice | {"clamp": 0.8}),
        Sample("images", (x, u2, d2, b), twice | {"clamp": 0.8, "gain": 1.0, "slope": 0.1}),
        Sample(
            "up4_down2", (rand(1, 2, 4, 9), _low_pass(12), d), {"up": 4, "down": 2, "padding": 6}
        ),
        Sample("mixed", (x, u, d2, b), {"up": (3, 2), "down": (1, 3), "padding": 4}),
        Sample("crop", (rand(1, 2, 7, 9), u2, d, rand(2)), {"up": 2, "padding": (-3, 1, 2, -2)}),
        Sample("flipped", (x, u2, d2), twice | {"flip_filter": True, "clamp": 0.5}),
        Sample("no_filters", (x,), {"bias": b, "clamp": 1.0}),
        Sample("gaps", (x, u, _low_pass(2)), {"up": 2, "down": 3, "padding": 3}),
        Sample("channels_last", (channels_last(rand(2, 4, 5, 3)), u, d, rand(4)), twice),
        Sample("wide", (rand(1, 1, 3, 41), u, d), twice | {"clamp": 0.8}),
        Sample("empty", (rand(0, 3, 4, 4), u, d, b), twice),
        Sample("strips", (rand(1, 2, 70, 9), u, d, rand(2)), twice, differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x, f = rand(2, 3, 4, 4), _low_pass(4)
    return [
        Refusal("dtype", (x.to(torch.int32), f, f), TypeError, "x must be float64"),
        Refusal("dims", (x[0], f, f), ValueError, "x must have 4 dimensions"),
        Refusal("no_pixels", (rand(1, 3, 0, 4), f, f), ValueError, "at least one pixel"),
        Refusal("up_dims", (x, f.view(1, 1, 4), f), ValueError, "up_filter must have shape"),
        Refusal("down_empty", (x, f, f[:0]), ValueError, "down_filter must have shape"),
        Refusal("up_dtype", (x, f.int(), f), TypeError, "up_filter must be float64"),
        Refusal("up_size", (x, rand(5, 1), f), ValueError, "up_filter must not be larger"),
        Refusal("down_size", (x, f, f), ValueError, "down_filter must not be larger"),
        Refusal("bias", (x, f, None, rand(2)), ValueError, "bias must have shape"),
        Refusal("up", (x, f, f, None, 0), ValueError, "up must be at least 1"),
        Refusal("gradient", (x, rand(4).requires_grad_(), f), ValueError, "up_filter must not"),
    ]


OPS = {
    "filtered_lrelu": OpSamples(
        ops.filtered_lrelu,
        _samples,
        _refusals,
        large=lambda: [
            Sample(
                f"{name}_1x64x128x128",
                (rand(1, 64, 128, 128), *filters, rand(64)),
                {"up": up, "down": 2, "padding": padding, "clamp": 256.0},
            )
            # A layer of StyleGAN3-T at a fixed resolution, one that doubles it, and one of
            # StyleGAN3-R, whose filters are radial.
            for name, filters, up, padding in (
                ("up2_down2", (_low_pass(12), _low_pass(12)), 2, 10),
                ("up4_down2", (_low_pass(24), _low_pass(12)), 4, 15),
                ("radial", (_low_pass(12), _low_pass(12, 12)), 2, 10),
            )
        ],
        constants=(1, 2),
    ),
}

import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
FILTER = torch.outer(FILTER, FILTER) / FILTER.sum() ** 2


def _samples() -> list[Sample]:
    up2 = {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}
    down2 = {"down": 2, "padding": 1}
    fused = {"bias": rand(3, seed=3), "act": "lrelu"}
    x, odd = rand(2, 3, 5, 7), rand(3, 4, seed=1)
    taps = rand(5, seed=2)
    return [
        Sample("up2", (x, FILTER), up2),
        Sample("up2_act", (x, FILTER), up2 | fused | {"clamp": 0.9}),
        Sample("up2_wide", (rand(1, 2, 3, 37), FILTER), up2),
        Sample("down2", (x, FILTER), down2),
        Sample("down2_wide", (rand(1, 2, 6, 75), FILTER), down2),
        Sample("blur", (rand(1, 2, 6, 19), odd), {"padding": (2, 1)}),
        Sample("flipped", (x, odd), {"padding": 2, "flip_filter": True}),
        Sample("mixed", (x, odd), {"up": (3, 2), "down": (2, 3), "padding": (1, 2, 3, 0)}),
        Sample("up4_down6", (x, odd), {"up": (4, 1), "down": (6, 1), "padding": 3}),
        Sample("crop", (rand(1, 2, 9, 11), odd), {"padding": (-2, 1, -1, -3)}),
        Sample("crop_up", (rand(1, 2, 9, 11), FILTER), {"up": 2, "padding": (-3, -2, 1, -5)}),
        Sample("cropped_away", (rand(1, 2, 3, 2), taps), {"up": 2, "padding": (-5, 9, 2, 1)}),
        Sample("separable", (x, taps), {"up": 2, "padding": (3, 2), "gain": 4.0}),
        Sample("separable_down", (x, taps), {"down": (2, 1), "padding": 2} | fused),
        Sample("channels_last", (channels_last(rand(2, 19, 4, 5)), FILTER), up2),
        Sample(
            "channels_last_act",
            (channels_last(rand(2, 6, 4, 5)), odd),
            down2 | {"bias": rand(6), "act": "relu"},
        ),
        Sample("channels_last_separable", (channels_last(rand(2, 6, 4, 5)), taps), up2),
        Sample("smooth", (x, FILTER), up2 | fused | {"act": "swish"}),
        Sample("negative_gain", (x, FILTER), down2 | fused | {"act_gain": -0.5}),
        Sample("clamp_alone", (x, FILTER), {"clamp": 0.3}),
        Sample("pixel", (rand(2, 3, 1, 1), rand(1, 1))),
        Sample("empty", (rand(0, 3, 4, 4), FILTER)),
        Sample("many_rows", (rand(1, 2, 41, 5), FILTER), up2, differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x, f = rand(2, 3, 4, 4), FILTER
    return [
        Refusal("dtype", (x.to(torch.int32), f), TypeError, "x must be float64"),
        Refusal("dims", (x[0], f), ValueError, "x must have 4 dimensions"),
        Refusal("filter_dims", (x, f[None]), ValueError, "filter must have shape"),
        Refusal("filter_empty", (x, f[:0]), ValueError, "filter must have shape"),
        Refusal("filter_dtype", (x, f.int()), TypeError, "filter must be float64"),
        Refusal("filter_size", (x, rand(5, 1)), ValueError, "filter must not be larger"),
        Refusal("cropped", (x, f), ValueError, "filter must not be larger", {"padding": -1}),
        Refusal("no_pixels", (rand(1, 3, 0, 4), f), ValueError, "at least one pixel"),
        Refusal("up", (x, f, 0), ValueError, "up must be at least 1"),
        Refusal("down", (x, f, 1, (1, 0)), ValueError, "down must be at least 1"),
        Refusal("padding", (x, f, 1, 1, (1, 2, 3)), ValueError, "padding must have"),
        Refusal("bias", (x, f), ValueError, "bias must have shape", {"bias": rand(2)}),
        Refusal("act", (x, f), ValueError, "act must be one of", {"act": "gelu"}),
    ]


OPS = {
    "upfirdn2d": OpSamples(
        ops.upfirdn2d,
        _samples,
        _refusals,
        large=lambda: [
            Sample(
                "up2_8x128x64x64",
                (rand(8, 128, 64, 64), FILTER),
                {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0, "bias": rand(128), "act": "lrelu"},
            ),
            Sample(
                "down2_8x128x128x128",
                (rand(8, 128, 128, 128), FILTER),
                {"down": 2, "padding": 1},
            ),
        ],
        constants=(1,),
    ),
}

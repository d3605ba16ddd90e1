import dataclasses

import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

#: shapes of image U-Nets and autoencoders, and of a video autoencoder, all with 32 groups
SHAPES = [(1, 320, 64, 64), (4, 128, 128, 128), (2, 512, 16, 16), (1, 128, 4, 128, 128)]


def _call(*shape: int, groups: int, name: str = "", affine: bool = True, **kwargs) -> Sample:
    x = rand(*shape) + 0.5
    params = (rand(shape[1], seed=1), rand(shape[1], seed=2)) if affine else ()
    name = name or "x".join(map(str, shape))
    return Sample(name, (x, groups, *params), kwargs, differentiable=x.numel() < 500)


def _with_x(sample: Sample, x: Tensor, name: str, differentiable: bool | None = None) -> Sample:
    keep = sample.differentiable if differentiable is None else differentiable
    return Sample(name, (x, *sample.args[1:]), sample.kwargs, keep)


def _samples() -> list[Sample]:
    silu = {"act": "silu"}
    image = _call(2, 6, 5, 7, groups=3, name="image", **silu)
    wide = _call(2, 72, 33, 3, groups=4, name="wide", **silu)
    video = _call(2, 4, 3, 2, 5, groups=2, name="video", act="gelu")
    special = rand(3, 4, 17)
    special[0, 0, 2], special[0, 2, 3] = torch.nan, torch.inf
    special[1, :2], special[1, 2:] = 0, 3e4 * special[1, 2:]
    special[2, :2] = 7.3e3
    special[2, 2:] *= 1e-20
    large_mean = _call(1, 4, 1025, groups=2)
    begins_apart = large_mean.args[0].clone()
    begins_apart[:, ::2, :40] += 1e3
    return [
        image,
        _call(2, 6, 5, 7, groups=3, name="gelu", act="gelu", eps=1e-2),
        _call(2, 6, 5, 7, groups=3, name="gelu_tanh", act="gelu_tanh"),
        _call(2, 6, 5, 7, groups=3, name="none"),
        _with_x(image, channels_last(image.args[0]), "channels_last"),
        _with_x(wide, channels_last(wide.args[0]), "channels_last_wide", False),
        video,
        _with_x(
            video,
            video.args[0].contiguous(memory_format=torch.channels_last_3d),
            "channels_last_3d",
        ),
        _call(3, 12, groups=4, name="no_space", **silu),
        _call(2, 3, 17, groups=1, name="layer", **silu),
        _call(2, 3, 17, groups=3, name="instance", affine=False, **silu),
        # Its gradient is a difference of equal numbers: zero but for their rounding.
        dataclasses.replace(_call(1, 1, 1, 1, groups=1, name="one", **silu), differentiable=False),
        Sample("weight_only", (rand(2, 4, 3), 2, rand(4)), silu),
        Sample("bias_only", (rand(2, 4, 3), 2, None, rand(4)), silu),
        _call(0, 4, 3, groups=2, name="no_samples", **silu),
        _call(2, 4, 0, groups=2, name="no_elements", **silu),
        Sample("special", (special, 2, rand(4), rand(4)), silu, differentiable=False),
        _with_x(large_mean, large_mean.args[0] + 300.0, "large_mean", False),
        _with_x(large_mean, begins_apart, "begins_apart", False),
        _call(2, 8, 127, groups=2, **silu),
        _call(1, 2, 9001, groups=2, name="pieces", **silu),
        _call(2, 32, 9, 33, groups=16, name="units", **silu),
        _call(1, 2, 300, 500, groups=1, name="beyond_the_cache", **silu),
    ]


def _refusals() -> list[Refusal]:
    x, w = rand(2, 4, 3), rand(4)
    return [
        Refusal("dtype", (x.int(), 2), TypeError, "x must be float64"),
        Refusal("vector", (rand(4), 2), ValueError, r"x must have at least 2 dimensions"),
        Refusal("groups", (x, 3, w, w), ValueError, r"num_groups must divide the channels of x"),
        Refusal("no_groups", (x, 0, w, w), ValueError, "num_groups must divide"),
        Refusal("weight", (x, 2, rand(3)), ValueError, r"weight must have shape \(4,\)"),
        Refusal("weight_dtype", (x, 2, w.float()), TypeError, "weight must have the dtype of x"),
        Refusal("bias", (x, 2, w, rand(1, 4)), ValueError, r"bias must have shape \(4,\)"),
        Refusal(
            "act",
            (x, 2),
            ValueError,
            "act must be one of none, silu, gelu, gelu_tanh, got 'relu'",
            {"act": "relu"},
        ),
    ]


def _large() -> list[Sample]:
    samples = []
    for shape in SHAPES:
        sample = _call(*shape, groups=32, act="silu")
        order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x = sample.args[0].contiguous(memory_format=order)
        samples += [sample, _with_x(sample, x, f"{sample.name}-channels_last")]
    return samples


OPS = {"group_norm_act": OpSamples(ops.group_norm_act, _samples, _refusals, _large)}

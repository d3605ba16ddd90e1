"""Nearest upsampling and a 3x3 convolution: as one transposed convolution, and the two calls."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Sample, channels_last, rand

OP = OpSamples(ops.upsample_conv2d, samples=list, refusals=list)


def two_calls(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


def upsampler(n: int, channels: int, size: int) -> Sample:
    """Of a U-Net or of an autoencoder's decoder."""
    x, weight = rand(n, channels, size, size), rand(channels, channels, 3, 3, seed=1)
    name = f"{n}x{channels}x{size}x{size}"
    return Sample(name, (channels_last(x), weight / weight[0].numel() ** 0.5, rand(channels)))


# In float32 the gradient of x misses the error rule by a little (see the operator): not timed.
@pytest.mark.parametrize(
    ("dtype", "direction"),
    [
        (torch.float32, "forward"),
        (torch.bfloat16, "forward"),
        (torch.bfloat16, "forward_backward"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "sample", [upsampler(4, 256, 16), upsampler(1, 128, 128)], ids=lambda s: s.name
)
def bench_upsample_conv2d(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=two_calls, backward=direction != "forward")

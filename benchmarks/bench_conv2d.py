"""torch's 3x3 convolution and ours, which has fewer products; with a training step's gradients."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Sample, channels_last, rand


def ours(x, weight, bias):
    return ops.conv2d(x, weight, bias, padding=1)


def torchs(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def layer(batch: int, channels: int, out: int, size: int) -> Sample:
    weight = rand(out, channels, 3, 3, seed=1, scale=(9 * channels) ** -0.5)
    x = channels_last(rand(batch, channels, size, size))
    return Sample(f"{batch}x{channels}x{size}x{size}_to_{out}", (x, weight, rand(out, seed=2)))


OP = OpSamples(ours, samples=list, refusals=list)
SAMPLES = [layer(1, 256, 256, 16), layer(8, 128, 128, 32), layer(1, 512, 512, 64)]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def bench_conv2d(measure, sample, direction) -> None:
    measure(OP, sample, torch.float32, eager=torchs, backward=direction != "forward")


def bench_conv2d_float16(measure) -> None:
    """On a CPU without instructions for it."""
    measure(OP, SAMPLES[0], torch.float16, eager=torchs)

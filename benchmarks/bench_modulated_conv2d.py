"""StyleGAN2's modulated convolution beside the two forms that StyleGAN2's authors sample and train
with, and its prologue and epilogue beside the elementwise chain."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples import OPS, Sample, rand

PASS = OPS["scale_bias_act"]
CONV = dataclasses.replace(PASS, function=ops.modulated_conv2d, constants=(3,))


def eager_pass(x, scale, noise=None, strength=None, bias=None, act="linear"):
    n, c = scale.shape
    y = x * scale.view(n, c, 1, 1)
    if noise is None:
        return y
    y = y + noise * strength
    return F.leaky_relu(y + bias.view(1, c, 1, 1), 0.2) * 2**0.5


def eager_conv(x, weight, style, noise, strength, bias, *, act):
    """To sample: the weights of each sample, (batch, out, in, k, k), in one grouped convolution."""
    n, c, h, w = x.shape
    own = weight * style.view(n, 1, c, 1, 1)
    own = own * torch.rsqrt(own.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    y = F.conv2d(x.reshape(1, n * c, h, w), own.flatten(0, 1), padding=1, groups=n)
    y = y.view(n, -1, h, w) + noise * strength
    return F.leaky_relu(y + bias.view(1, -1, 1, 1), 0.2) * 2**0.5


def eager_training_conv(x, weight, style, noise, strength, bias, *, act):
    """To train: the pixels scaled before and after one convolution."""
    own = weight * style[:, None, :, None, None]
    demodulation = torch.rsqrt(own.square().sum((2, 3, 4)) + 1e-8)
    y = F.conv2d(x * style[:, :, None, None], weight, padding=1)
    y = y * demodulation[:, :, None, None] + noise * strength
    return F.leaky_relu(y + bias.view(1, -1, 1, 1), 0.2) * 2**0.5


def layer(n: int, channels: int, size: int) -> Sample:
    """A layer of the synthesis network."""
    x, weight = rand(n, channels, size, size), rand(channels, channels, 3, 3)
    noise = rand(n, 1, size, size), rand(1)
    rest = rand(n, channels) + 1, *noise, rand(channels)
    return Sample(f"{n}x{channels}x{size}x{size}", (x, weight, *rest), {"act": "lrelu"})


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", PASS.large(), ids=lambda s: s.name)
def bench_scale_bias_act(measure, sample, dtype, direction) -> None:
    measure(PASS, sample, dtype, eager=eager_pass, backward=direction != "forward")


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("sample", [layer(8, 512, 8), layer(8, 128, 64)], ids=lambda s: s.name)
def bench_modulated_conv2d(measure, sample, direction) -> None:
    backward = direction != "forward"
    eager = eager_training_conv if backward else eager_conv
    measure(CONV, sample, torch.float32, eager=eager, backward=backward)

"""Noise for diffusion training, with the v target in the same pass."""

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["add_noise"]


def eager(sample, noise, alpha, sigma, *, return_velocity):
    shape = [-1] + [1] * (sample.dim() - 1)
    a, s = alpha.to(sample.dtype).view(shape), sigma.to(sample.dtype).view(shape)
    return a * sample + s * noise, a * noise - s * sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_add_noise(measure, sample, dtype) -> None:
    assert sample.kwargs == {"return_velocity": True}
    measure(OP, sample, dtype, eager=eager)

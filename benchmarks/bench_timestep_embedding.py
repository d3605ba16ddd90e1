"""Sinusoidal embedding of timesteps, beside diffusers' fourteen operations."""

import math

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["timestep_embedding"]


def eager(timesteps, dim, *, flip_sin_to_cos, downscale_freq_shift):
    """In float64 for float64 timesteps, which diffusers never takes: that is the truth, by which
    its float32 frequencies are the yardstick."""
    half = dim // 2
    steps = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000) * steps / (half - downscale_freq_shift))
    angle = timesteps[:, None] * frequencies
    out = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return torch.cat([out[:, half:], out[:, :half]], dim=-1) if flip_sin_to_cos else out


@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_timestep_embedding(measure, sample) -> None:
    measure(OP, sample, torch.float32, eager=eager)

"""The weighted loss of v prediction, forward and backward, the target made in the same pass."""

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["diffusion_loss"]


def eager(model_output, sample, noise, alpha, sigma, weights, *, prediction_type):
    shape = [-1] + [1] * (sample.dim() - 1)
    a, s = alpha.to(sample.dtype).view(shape), sigma.to(sample.dtype).view(shape)
    target = a * noise - s * sample
    error = (model_output.float() - target.float()).square().flatten(1).mean(1)
    return (weights.float() * error).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_diffusion_loss(measure, sample, dtype) -> None:
    # Three tensors are read, then again, and the gradient is written.
    moved = 7 * sample.args[0].numel() * dtype.itemsize
    measure(OP, sample, dtype, eager=eager, backward=True, bytes_moved=moved)

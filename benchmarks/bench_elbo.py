"""The terms of a VAE's bound, forward and backward: a draw with its divergence, a likelihood."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

SAMPLE, LOSS = OPS["sample_gaussian"], OPS["reconstruction_loss"]


def eager_sample(parameters, noise):
    """As diffusers' DiagonalGaussianDistribution has it."""
    mean, log_variance = parameters.chunk(2, dim=1)
    log_variance = torch.clamp(log_variance, -30.0, 20.0)
    sample = mean + torch.exp(0.5 * log_variance) * noise
    dims = list(range(1, mean.dim()))
    wide = torch.promote_types(mean.dtype, torch.float32)
    mean, log_variance = mean.to(wide), log_variance.to(wide)
    kl = 0.5 * torch.sum(mean.pow(2) + log_variance.exp() - 1.0 - log_variance, dim=dims)
    return sample, kl


def eager_loss(output, target, kind="bernoulli"):
    wide = torch.promote_types(output.dtype, torch.float32)
    output, target = output.to(wide), target.to(wide)
    if kind == "bernoulli":
        loss = F.binary_cross_entropy_with_logits(output, target, reduction="none")
    elif kind == "gaussian":
        loss = 0.5 * F.mse_loss(output, target, reduction="none")
    else:
        loss = F.l1_loss(output, target, reduction="none")
    return loss.flatten(1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLE.large(), ids=lambda s: s.name)
def bench_sample_gaussian(measure, sample, dtype) -> None:
    # Mean, log-variance and noise in, the sample out; then those and its gradient in, three out.
    moved = 11 * sample.args[1].numel() * dtype.itemsize
    measure(SAMPLE, sample, dtype, eager=eager_sample, backward=True, bytes_moved=moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LOSS.large(), ids=lambda s: s.name)
def bench_reconstruction_loss(measure, sample, dtype) -> None:
    # Two tensors are read, then again, and the gradient is written.
    moved = 5 * sample.args[0].numel() * dtype.itemsize
    measure(LOSS, sample, dtype, eager=eager_loss, backward=True, bytes_moved=moved)

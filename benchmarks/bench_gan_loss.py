"""Losses of adversarial training, forward and backward: a batch's logits, and those of patches."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["discriminator_loss"]


def eager(real, fake, loss="non_saturating"):
    if loss == "non_saturating":
        bce = F.binary_cross_entropy_with_logits
        return bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    if loss == "least_squares":
        return (
            F.mse_loss(real, torch.ones_like(real)) + F.mse_loss(fake, torch.zeros_like(fake))
        ) / 2
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if loss == "wasserstein":
        return fake.mean() - real.mean()
    return F.softplus(fake - real).mean()


@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_gan_loss(measure, sample) -> None:
    measure(OP, sample, torch.float32, eager=eager, backward=True)

"""Adversarial training with the non-saturating logistic loss."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import batches
from .ema import EMA


class GANStep(NamedTuple):
    """Where training stands after a step. The losses stay on the device until they are read."""

    epoch: int
    epochs: int
    step: int
    steps: int
    g_loss: Tensor
    d_loss: Tensor

    def __str__(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"G Loss: {self.g_loss.item():.4f}, D Loss: {self.d_loss.item():.4f}"
        )


class GANTrainer:
    """Trains a generator (latents to samples) against a discriminator (samples to logits).

    D minimises bce(D(x), 1) + bce(D(G(z)), 0), G minimises bce(D(G(z)), 1), with Adam each
    (Goodfellow et al. 2014, arXiv:1406.2661; the optimiser's numbers are DCGAN's,
    arXiv:1511.06434).

    instance_noise: standard deviation of noise added to all that the discriminator sees
        (arXiv:1610.04490), so that it judges shapes and not single pixels. On 5,000 digits, after
        2,700 steps, 0.5 gave most kinds of digits where without it most samples were ones.
    average: the generator with averaged weights, the one to sample from.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_dim: int,
        *,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        instance_noise: float = 0.0,
        ema_decay: float = 0.995,
        seed: int = 0,
    ) -> None:
        self.instance_noise = instance_noise
        self.generator, self.discriminator, self.latent_dim = generator, discriminator, latent_dim
        self.g_parameters = list(generator.parameters())
        self.g_optimizer = torch.optim.Adam(self.g_parameters, lr, betas, fused=True)
        self.d_optimizer = torch.optim.Adam(discriminator.parameters(), lr, betas, fused=True)
        self.ema = EMA(generator, ema_decay)
        self.device = self.g_parameters[0].device
        self.random = torch.Generator(self.device).manual_seed(seed)

    @property
    def average(self) -> nn.Module:
        return self.ema.model

    def latents(self, batch_size: int) -> Tensor:
        """Standard normal (batch_size, latent_dim), the next ones of the trainer's seed."""
        like = self.g_parameters[0]
        return like.new_empty(batch_size, self.latent_dim).normal_(generator=self.random)

    def step(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """One update of each network on a batch of real samples; returns (g_loss, d_loss)."""
        batch = len(real)
        fake = self.generator(self.latents(batch))
        # Real and fake in one batch: half as many matrix products, each twice as large.
        logits = self._judge(torch.cat([real, fake.detach()]))
        d_loss = 2 * F.binary_cross_entropy_with_logits(logits, self._targets(batch, logits))
        self.d_optimizer.zero_grad()
        d_loss.backward()
        self.d_optimizer.step()

        logits = self._judge(fake)
        g_loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        self.g_optimizer.zero_grad()
        # The discriminator's own gradients are not wanted here, so they are not computed.
        g_loss.backward(inputs=self.g_parameters)
        self.g_optimizer.step()
        self.ema.update(self.generator)
        return g_loss.detach(), d_loss.detach()

    def train(self, samples: Tensor, *, epochs: int, batch_size: int) -> Iterator[GANStep]:
        """Yields after every step; whoever iterates logs, plots, or stops."""
        steps = len(samples) // batch_size
        for epoch in range(1, epochs + 1):
            data = batches(samples, batch_size=batch_size, generator=self.random)
            for step, (real,) in enumerate(data, start=1):
                yield GANStep(epoch, epochs, step, steps, *self.step(real))

    def _judge(self, samples: Tensor) -> Tensor:
        if self.instance_noise:
            noise = torch.empty_like(samples).normal_(generator=self.random)
            samples = torch.add(samples, noise, alpha=self.instance_noise)
        return self.discriminator(samples)

    def _targets(self, batch: int, logits: Tensor) -> Tensor:
        """Ones for the real half, zeros for the other."""
        targets = torch.zeros_like(logits)
        targets[:batch] = 1
        return targets

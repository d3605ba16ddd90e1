"""Training of a diffusion model by v-prediction."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops

from .batches import batches
from .ema import EMA


class DiffusionStep(NamedTuple):
    """Where training stands after a step. The loss stays on the device until it is read."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: Tensor

    def __str__(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"Loss: {self.loss.item():.4f}"
        )


class DiffusionTrainer:
    """Trains model(noisy, timesteps, labels), where noisy = alpha * sample + sigma * noise at the
    timestep's alpha and sigma, to return v = alpha * noise - sigma * sample (Salimans & Ho 2022,
    arXiv:2202.00512). Where there is hardly a signal left, v asks for the sample and not, as the
    noise would, for a copy of the input.

    alphas_cumprod: (num_timesteps,), a scheduler's: alpha^2 at each timestep; sigma^2 is the rest.
    done:           done(step) is the share of the training, 0 to 1, that lies behind at a step,
                    such as `lambda step: step / 1000`. The learning rate rises over the first
                    twentieth and falls along a cosine to zero.
    null_label:     the class that stands for "any"; a share `unlabelled` of the labels is
                    replaced by it, so that the model learns both outputs of classifier-free
                    guidance (arXiv:2207.12598).
    average:        the model with averaged weights, the one to sample from.
    """

    def __init__(
        self,
        model: nn.Module,
        alphas_cumprod: Tensor,
        *,
        done: Callable[[int], float],
        lr: float = 2e-3,
        ema_decay: float = 0.997,
        null_label: int | None = None,
        unlabelled: float = 0.1,
        seed: int = 0,
    ) -> None:
        parameters = list(model.parameters())
        self.model, self.null_label, self.unlabelled = model, null_label, unlabelled
        self.device = parameters[0].device
        self.alphas = alphas_cumprod.sqrt().to(self.device)
        self.sigmas = (1 - alphas_cumprod).sqrt().to(self.device)
        self.optimizer = torch.optim.Adam(parameters, lr, fused=True)
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _warm_up_and_cosine(min(done(step), 1.0))
        )
        self.ema = EMA(model, ema_decay)
        self.random = torch.Generator(self.device).manual_seed(seed)

    @property
    def average(self) -> nn.Module:
        return self.ema.model

    def step(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """One update on a batch; returns the loss."""
        draw: dict[str, Any] = {"device": self.device, "generator": self.random}
        timesteps = torch.randint(len(self.alphas), (len(samples),), **draw)
        noise = torch.randn(samples.shape, dtype=samples.dtype, **draw)
        if labels is not None and self.null_label is not None:
            hidden = torch.rand(len(samples), **draw) < self.unlabelled
            labels = labels.masked_fill(hidden, self.null_label)
        noisy, velocity = ops.add_noise(
            samples, noise, self.alphas[timesteps], self.sigmas[timesteps], return_velocity=True
        )
        loss = F.mse_loss(self.model(noisy, timesteps, labels), velocity)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rate.step()
        self.ema.update(self.model)
        return loss.detach()

    def train(
        self, samples: Tensor, labels: Tensor, *, epochs: int, batch_size: int
    ) -> Iterator[DiffusionStep]:
        """Yields after every step; whoever iterates logs, plots, or stops."""
        steps = len(samples) // batch_size
        for epoch in range(1, epochs + 1):
            data = batches(samples, labels, batch_size=batch_size, generator=self.random)
            for step, (batch, names) in enumerate(data, start=1):
                yield DiffusionStep(epoch, epochs, step, steps, self.step(batch, names))


def _warm_up_and_cosine(done: float) -> float:
    return min(1.0, 20 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2

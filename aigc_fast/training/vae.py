"""Training of variational autoencoders, and the bound that judges them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops._checks import check_choice, check_positive
from aigc_fast.ops.elbo import HIGHEST, LIKELIHOODS, LOWEST

from .ema import EMA
from .optim import AdamW
from .statistics import keep_statistics
from .trainer import (
    Trainer,
    check_not_negative,
    check_share,
    recipe_or_default,
    warm_up_and_cosine,
)

#: nats of an element that `ops.reconstruction_loss` leaves out
_CONSTANTS = {"bernoulli": 0.0, "gaussian": math.log(2 * math.pi) / 2, "laplace": math.log(2)}


@dataclass(frozen=True)
class VAERecipe:
    """How a VAE is trained. What is minimised is the mean over images of
    reconstruction + beta * max(divergence, free_bits), in nats.

    likelihood: of the pixels, in [-1, 1], given what the decoder returns; a kind of
                `ops.reconstruction_loss`. "bernoulli": it returns logits of (pixel + 1) / 2.
                "gaussian" and "laplace": it returns the means of the pixels.
    beta:       weight of the divergence (Higgins et al. 2017). A Gaussian likelihood of standard
                deviation s in place of 1 is the same as beta = s^2.
    warm_up:    share of the training, 0 to 1, over which that weight rises linearly from zero
                (arXiv:1602.02282).
    free_bits:  nats of each image's divergence, over all its latents together, that cost nothing
                (arXiv:1606.04934 has them for groups of latents).
    lr, betas, weight_decay: of AdamW. The learning rate rises over the first twentieth of the
                training and falls along a cosine to zero.
    max_norm:   the norm that gradients are clipped to; None for no clipping.
    ema_decay:  of the averaged weights; less in the first steps.
    bf16:       run the model under bfloat16 autocast; weights, latents and losses stay as they are.
    """

    likelihood: str = "bernoulli"
    beta: float = 1.0
    warm_up: float = 0.1
    free_bits: float = 0.0
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_norm: float | None = None
    ema_decay: float = 0.997
    bf16: bool = False

    def __post_init__(self) -> None:
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        check_share(self, "warm_up")
        check_not_negative(self, "beta", "free_bits", "lr", "weight_decay")

    def weight(self, done: float) -> float:
        """Of the divergence at that share of the training."""
        return self.beta * (min(done / self.warm_up, 1.0) if self.warm_up else 1.0)


class VAEStep(NamedTuple):
    """Where training stands after a step: the loss, and its two terms as they are without beta and
    free bits, means over the batch. They stay on the device until they are read."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: Tensor
    reconstruction: Tensor
    kl: Tensor

    def __str__(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"Reconst Loss: {self.reconstruction.item():.4f}, KL Div: {self.kl.item():.4f}"
        )


class VAETrainer(Trainer):
    """Trains a model of encode(images) -> parameters, as `ops.sample_gaussian` takes them, and
    decode(latents), both called with labels as well where there are some. A step whose loss or
    gradients are not finite leaves weights, their averages and the optimizer as they are and is
    counted in `skipped`; the running statistics of batch norms have moved by then, unless they are
    not finite.

    recipe:  what is minimised, and how.
    done:    done(step) is the share of the training, 0 to 1, that is done by a step, such as
             `lambda step: step / 1000`: beta and the learning rate depend on it.
    seed:    of noise and the order of samples. The same seed gives the same losses, to the bit,
             also where training was interrupted and resumed from `state_dict`.
    average: the model with averaged weights, the one to sample from.
    """

    ema: EMA

    def __init__(
        self,
        model: nn.Module,
        recipe: VAERecipe | None = None,
        *,
        done: Callable[[int], float],
        seed: int = 0,
    ) -> None:
        recipe = recipe_or_default(recipe, VAERecipe)
        self.model = model
        ema = EMA(model, recipe.ema_decay)
        self.optimizer = AdamW(
            model.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay,
            max_norm=recipe.max_norm, average=ema,
        )  # fmt: skip
        super().__init__(recipe, {"model": model}, {"optimizer": self.optimizer}, ema, done, seed)

    def terms(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(reconstruction, kl), each (batch,) in nats, with new noise."""
        classes = () if labels is None else (labels,)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            parameters = self.model.encode(images, *classes)  # type: ignore[operator]
        parameters = parameters.float()
        noise = torch.empty_like(parameters.chunk(2, 1)[0]).normal_(generator=self.random)
        latents, kl = ops.sample_gaussian(parameters, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            output = self.model.decode(latents, *classes)  # type: ignore[operator]
        kind = self.recipe.likelihood
        return ops.reconstruction_loss(output, _target(images, kind), kind), kl

    def step(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One update on a batch; returns (loss, reconstruction, kl)."""
        recipe, done = self.recipe, self.share_done
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * warm_up_and_cosine(done)
        restore = keep_statistics(self.model)
        reconstruction, kl = self.terms(images, labels)
        priced = kl.clamp(min=recipe.free_bits) if recipe.free_bits else kl
        loss = (reconstruction + recipe.weight(done) * priced).mean()
        self.optimizer.zero_grad()
        loss.backward()
        restore()
        self.ema.update_buffers(self.model)
        self.optimizer.step(loss=loss)  # moves the averaged weights too
        self.steps_done += 1
        return loss.detach(), reconstruction.detach().mean(), kl.detach().mean()

    def _run_step(self, place: tuple[int, int, int, int], batch: tuple[Tensor, ...]) -> VAEStep:
        return VAEStep(*place, *self.step(*batch))


def _target(images: Tensor, likelihood: str) -> Tensor:
    return (images + 1) / 2 if likelihood == "bernoulli" else images


def images_of(output: Tensor, likelihood: str) -> Tensor:
    """The most likely images, in [-1, 1], of what a decoder gives for that likelihood."""
    return 2 * output.sigmoid() - 1 if likelihood == "bernoulli" else output.clamp(-1, 1)


@torch.no_grad()
def log_likelihood(
    model: Any,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    samples: int = 100,
    likelihood: str = "bernoulli",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The importance-weighted bound on log p(images), (batch,) in nats of a whole image:

        log(1 / samples * sum_k p(image | z_k) p(z_k) / q(z_k | image)), z_k drawn from q

    With one sample its mean is the ELBO; with more it comes closer to the likelihood. Unlike the
    loss of training it counts the constants of the Gaussian and the Laplace density.

    model:     as for VAETrainer.
    images:    in [-1, 1], as for VAERecipe. They are decoded together, `samples` times: a data set
               is for the caller to cut.
    generator: draws z, on the device of images.

    Source: Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519.
    """
    check_positive(samples=samples)
    classes = () if labels is None else (labels,)
    parameters = model.encode(images, *classes).float()
    _, log_variance = parameters.chunk(2, 1)
    deviations = log_variance.clamp(LOWEST, HIGHEST).flatten(1).sum(1)
    target, weights = _target(images, likelihood), []
    for _ in range(samples):
        noise = torch.empty_like(log_variance).normal_(generator=generator)
        latents, _ = ops.sample_gaussian(parameters, noise)
        output = model.decode(latents, *classes)
        # log p(z) - log q(z | image), in which 2 pi cancels
        prior = (noise.square() - latents.square()).flatten(1).sum(1) + deviations
        weights.append(prior / 2 - ops.reconstruction_loss(output, target, likelihood))
    bound = torch.stack(weights).logsumexp(0) - math.log(samples)
    return bound - _CONSTANTS[likelihood] * images[0].numel()

"""Training of a diffusion model: epsilon, v or flow prediction, one trainer for all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aigc_fast import ops

from .denoising import PREDICTIONS, Denoising
from .ema import EMA
from .gradient_checkpointing import checkpoint_blocks
from .optim import AdamW
from .statistics import keep_statistics
from .trainer import (
    Trainer,
    check_not_negative,
    check_share,
    recipe_or_default,
    warm_up_and_cosine,
)


@dataclass(frozen=True)
class DiffusionRecipe(Denoising):
    """What the model predicts, and how it is trained.

    prediction, schedule, weighting: as for `Denoising`.

    lr, betas, weight_decay: of AdamW. The learning rate rises over the first twentieth of the
                training and falls along a cosine to zero.
    max_norm:   the norm that gradients are clipped to; None for no clipping.
    ema_decay:  of the averaged weights; less in the first steps.
    unlabelled: share of the labels that "any" replaces, so that the model learns both outputs of
                classifier-free guidance (arXiv:2207.12598).
    bf16:       run the model under bfloat16 autocast; weights stay as they are.
    gradient_checkpointing: keep only the inputs of the model's blocks, and compute what is inside
                them again for the gradients: a third more time, a fraction of the memory.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_norm: float | None = None
    ema_decay: float = 0.997
    unlabelled: float = 0.1
    bf16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "lr", "weight_decay")
        check_share(self, "unlabelled")


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


class DiffusionTrainer(Trainer):
    """Trains model(noisy, timesteps, labels). A step whose loss or gradients are not finite leaves
    weights, their averages and the optimizer as they are and is counted in `skipped`; the running
    statistics of batch norms have moved by then, unless they are not finite.

    recipe:  what is minimised, and how; by default v at the cosine schedule.
    done:    done(step) is the share of the training, 0 to 1, that is done by a step, such as
             `lambda step: step / 1000`: the learning rate depends on it.
    null_label: the class that stands for "any"; None where there are no classes.
    seed:    of noise, timesteps and the order of samples. The same seed gives the same losses, to
             the bit, also where training was interrupted and resumed from `state_dict`.
    average: the model with averaged weights, the one to sample from.
    """

    ema: EMA

    def __init__(
        self,
        model: nn.Module,
        recipe: DiffusionRecipe | None = None,
        *,
        done: Callable[[int], float],
        null_label: int | None = None,
        seed: int = 0,
    ) -> None:
        recipe = recipe_or_default(recipe, DiffusionRecipe)
        self.model, self.null_label, self.scheduler = model, null_label, recipe.scheduler()
        ema = EMA(model, recipe.ema_decay)
        if recipe.gradient_checkpointing:
            checkpoint_blocks(model)
        self.optimizer = AdamW(
            model.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay,
            max_norm=recipe.max_norm, average=ema,
        )  # fmt: skip
        super().__init__(recipe, {"model": model}, {"optimizer": self.optimizer}, ema, done, seed)

    def loss(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Of a batch with new noise at new timesteps, part of the labels hidden."""
        recipe, random = self.recipe, self.random
        timesteps = recipe.draw_timesteps(len(samples), random)
        noise = torch.empty_like(samples).normal_(generator=random)
        if labels is not None and self.null_label is not None:
            hidden = torch.rand(len(samples), generator=random, device=self.device)
            labels = labels.masked_fill(hidden < recipe.unlabelled, self.null_label)
        alpha, sigma = self.scheduler.levels(timesteps)
        noisy = ops.add_noise(samples, noise, alpha, sigma)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            output = self.model(noisy, timesteps, labels)
        return ops.diffusion_loss(
            output, samples, noise, alpha, sigma, recipe.weights(alpha, sigma),
            prediction_type=PREDICTIONS[recipe.prediction],
        )  # fmt: skip

    def step(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """One update on a batch; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * warm_up_and_cosine(self.share_done)
        restore = keep_statistics(self.model)
        loss = self.loss(samples, labels)
        self.optimizer.zero_grad()
        loss.backward()
        restore()
        self.ema.update_buffers(self.model)
        self.optimizer.step(loss=loss)  # moves the averaged weights too
        self.steps_done += 1
        return loss.detach()

    def _run_step(
        self, place: tuple[int, int, int, int], batch: tuple[Tensor, ...]
    ) -> DiffusionStep:
        return DiffusionStep(*place, self.step(*batch))

"""Training a GAN: networks and data by name, checkpoints, a log, pictures."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aigc_fast._devices import default_device
from aigc_fast.ops._checks import check_choice
from aigc_fast.training import RECIPES, GANRecipe, GANStep, GANTrainer
from aigc_fast.training.gan_recipe import PENALTIES

from .gan_networks import (
    ARCHITECTURES,
    LATENT_DIM,
    Config,
    draw,
    make_discriminator,
    make_generator,
)
from .labels import labels_of
from .pictures import save_grid
from .train import GANOptions
from .training_session import TrainingSession, load_data

_GRID = 96  # samples of a picture, in rows of twelve


class Session(TrainingSession):
    losses = ("g_loss", "d_loss")

    def __init__(self, options: GANOptions) -> None:
        self.options = options
        device = default_device()
        samples, labels = load_data(options.data, options.size)
        if samples.dim() != 4:
            raise ValueError(f"data must be images for a GAN, {options.data} are videos")
        self.samples = samples.to(device)
        self.labels = labels.to(device) if options.conditional else None
        self.networks = _networks(options, samples.shape[1], int(labels.max()) + 1)
        torch.manual_seed(options.seed)
        # Convolutions in bfloat16 take half the time in this layout, those in float32 the same.
        layout: Any = {"device": device, "memory_format": torch.channels_last}
        generator = make_generator(self.networks).to(**layout)
        discriminator = make_discriminator(self.networks).to(**layout)
        self.trainer = GANTrainer(
            generator,
            discriminator,
            LATENT_DIM,
            _recipe(options),
            done=self.share_done,
            seed=options.seed,
        )
        self.loss_label = f"{self.trainer.recipe.loss} loss"
        # The same latents in every picture: one sees them grow.
        fixed = torch.Generator().manual_seed(options.seed)
        self.latents = torch.randn(_GRID, self.trainer.latent_dim, generator=fixed).to(device)
        self.classes = labels_of(_GRID, None, self.networks["num_classes"], device)
        self.open()

    def losses_of(self, state: GANStep) -> tuple[Tensor, ...]:
        return state.g_loss, state.d_loss

    def keep_samples(self) -> None:
        images = draw(self.trainer.average, self.latents, self.classes)
        save_grid(self.options.output / "samples.png", images, columns=12)


def _recipe(options: GANOptions) -> GANRecipe:
    """That of the loss, with what else is asked for."""
    check_choice("loss", options.loss, RECIPES)
    changes: dict[str, Any] = {
        "penalty_weight": options.penalty_weight,
        "penalty_interval": options.penalty_interval,
        "g_lr": options.lr,
        "d_lr": options.lr,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.penalty is not None:
        check_choice("penalty", options.penalty, (*PENALTIES, "none"))
        changes["penalty"] = None if options.penalty == "none" else options.penalty
    recipe = replace(RECIPES[options.loss], bf16=options.bf16, **changes)
    if recipe.penalty is None and {"penalty_weight", "penalty_interval"} & set(changes):
        raise ValueError(f"penalty must be given with its weight or interval for {options.loss}")
    return recipe


def _networks(options: GANOptions, image_channels: int, num_classes: int) -> Config:
    check_choice("arch", options.arch, ARCHITECTURES)
    return {
        "arch": options.arch,
        "size": options.size,
        "image_channels": image_channels,
        "channels": options.channels,
        "num_classes": num_classes if options.conditional else None,
        # A penalty is of each sample by itself, and a batch norm mixes them.
        "norm": "batch" if _recipe(options).penalty is None else None,
    }

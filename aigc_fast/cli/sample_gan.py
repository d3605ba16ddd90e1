"""Samples of a GAN from its checkpoint."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from aigc_fast._devices import default_device
from aigc_fast.training import load_checkpoint

from .errors import reading
from .gan_networks import LATENT_DIM, Config, draw, make_generator
from .labels import labels_of
from .pictures import save_grid
from .sample import GANOptions


def load_generator(checkpoint: Path, device: torch.device) -> tuple[nn.Module, Config]:
    """The averaged generator of a checkpoint of `aigc-fast train gan` and its numbers; ValueError
    for another file."""
    state = load_checkpoint(checkpoint, device)
    with reading(checkpoint, "a checkpoint of a GAN"):
        generator = make_generator(state["networks"])
        generator.load_state_dict(state["trainer"]["average"])
    return generator.to(device).eval(), state["networks"]


def samples_of(
    generator: nn.Module, config: Config, count: int, label: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """(images (count, channels, height, width) in [-1, 1], their classes) on the CPU."""
    device = next(generator.parameters()).device
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, LATENT_DIM, generator=random)
    labels = labels_of(count, label, config["num_classes"])
    images = draw(generator, latents.to(device), labels.to(device) if labels is not None else None)
    return images, labels


def run(console: Console, options: GANOptions) -> None:
    device = default_device()
    generator, config = load_generator(options.checkpoint, device)
    images, _ = samples_of(generator, config, options.count, options.label, options.seed)
    save_grid(options.output, images, columns=min(options.count, 10))
    console.print(f"{options.count} samples in {options.output}", markup=False)

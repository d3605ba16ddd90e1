"""Pictures from a VAE's weights: samples, ways between samples, images beside what it makes of
them."""

import torch
from rich.console import Console
from torch import Tensor, nn

from aigc_fast._devices import default_device
from aigc_fast.ops._checks import check_choice
from aigc_fast.training.batches import as_floats
from aigc_fast.training.vae import images_of

from .labels import labels_of
from .pictures import save_grid
from .sample import VAEOptions
from .train_vae import held_out
from .training_session import load_data
from .vae_model import Config, load_model

_COLUMNS = 10


@torch.no_grad()
def run(console: Console, options: VAEOptions) -> None:
    check_choice("show", options.show, _PICTURES)
    device = default_device()
    model, config = load_model(options.checkpoint, device)
    images, columns = _PICTURES[options.show](model, config, options)
    save_grid(options.output, images.float().cpu(), columns)
    console.print(f"{options.count} {options.show} in {options.output}", markup=False)


def samples_of(
    model: nn.Module, config: Config, count: int, label: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """(images (count, channels, height, width) in [-1, 1], their classes)."""
    latents, labels = _draw(model, config, count, label, seed)
    return images_of(model.decode(latents, labels), config["likelihood"]), labels  # type: ignore[operator]


def _draw(
    model: nn.Module, config: Config, count: int, label: int | None, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Latents, the same on every device, and classes, all in turn by default."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, config["latent_dim"], generator=random).to(device)
    return latents, labels_of(count, label, config["num_classes"], device)


# Each gives images and how many stand in a row.


def _samples(model: nn.Module, config: Config, options: VAEOptions) -> tuple[Tensor, int]:
    images, _ = samples_of(model, config, options.count, options.label, options.seed)
    return images, min(len(images), _COLUMNS)


def _interpolations(model: nn.Module, config: Config, options: VAEOptions) -> tuple[Tensor, int]:
    """A row each, from one draw to another: cos(t) a + sin(t) b is standard normal all the way."""
    begin, labels = _draw(model, config, options.count, options.label, options.seed)
    end, _ = _draw(model, config, options.count, options.label, options.seed + 1)
    angle = torch.linspace(0, torch.pi / 2, _COLUMNS, device=begin.device)[:, None]
    latents = (angle.cos() * begin[:, None] + angle.sin() * end[:, None]).flatten(0, 1)
    classes = None if labels is None else labels.repeat_interleave(_COLUMNS)
    images = images_of(model.decode(latents, classes), config["likelihood"])  # type: ignore[operator]
    return images, _COLUMNS


def _reconstructions(model: nn.Module, config: Config, options: VAEOptions) -> tuple[Tensor, int]:
    """Rows of images that no training saw, below each row what the model makes of it."""
    device = next(model.parameters()).device
    images, labels = load_data(options.data, config["size"])
    if images.shape[1:] != (config["image_channels"], config["size"], config["size"]):
        raise ValueError(f"data must be images as the model's, {options.data} are others")
    aside = held_out(len(images)).nonzero()[:, 0]
    count = min(options.count, len(aside))
    chosen = aside[torch.linspace(0, len(aside) - 1, count).long()]
    images, labels = as_floats(images[chosen]).to(device), labels[chosen].to(device)
    classes = () if config["num_classes"] is None else (labels,)
    again = images_of(model(images, *classes), config["likelihood"])
    rows = zip(images.split(_COLUMNS), again.split(_COLUMNS), strict=True)
    return torch.cat([piece for row in rows for piece in row]), min(count, _COLUMNS)


_PICTURES = {
    "samples": _samples,
    "interpolations": _interpolations,
    "reconstructions": _reconstructions,
}

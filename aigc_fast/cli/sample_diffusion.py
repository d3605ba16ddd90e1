"""Samples of a diffusion model from its weights: images, a film of how they form, or videos."""

import math

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast._devices import default_device
from aigc_fast.models.diffusion import sample

from .diffusion_model import load_model, sample_shape, to_sample_from
from .labels import labels_of
from .pictures import FILMS, check_mp4, save_film, save_grid, save_videos
from .sample import DiffusionOptions
from .schedulers import make_scheduler


def run(console: Console, options: DiffusionOptions) -> None:
    suffix = options.output.suffix.lower()
    if suffix not in (".png", *FILMS):
        raise ValueError(f"output must be a .png, .gif or .mp4 file, got {options.output}")
    if suffix == ".mp4":
        check_mp4()
    device = default_device()
    images, stages = samples_of(options, device)
    columns = min(options.count, 10)
    if images.dim() == 5:
        save_videos(options.output, images)
    elif suffix in FILMS:
        save_film(options.output, stages, columns)
    else:
        save_grid(options.output, images, columns)
    console.print(f"{options.count} samples in {options.output}", markup=False)


def samples_of(options: DiffusionOptions, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the CPU: the samples (count, channels, [frames,] height, width), and what each step
    expected them to become, (steps, ...)."""
    model, config = load_model(options.checkpoint, device)
    scheduler = make_scheduler(options.scheduler, config["prediction"], config["schedule"])
    classes, count = config["num_classes"], options.count
    labels = labels_of(count, options.label, classes, device)
    if not math.isfinite(options.guidance):
        raise ValueError(f"guidance must be finite, got {options.guidance}")
    if options.guidance != 1 and not classes:
        raise ValueError("guidance must be 1 for a model without classes")
    stages: list[Tensor] = []
    images = sample(
        to_sample_from(model, config),
        scheduler,
        (count, *sample_shape(config)),
        labels=labels,
        null_label=classes,
        num_steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        on_step=lambda number, noisy, x0: stages.append(x0),
    )
    return images.float().cpu(), torch.stack(stages).float().cpu()

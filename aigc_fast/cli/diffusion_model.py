"""The diffusion models of the command line, as files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast.models.diffusion import DiT, SmallUNet
from aigc_fast.ops._checks import check_choice
from aigc_fast.training.denoising import PREDICTIONS, SCHEDULES, Denoising

from .weights import load_weights, save_weights

#: What a model is made of and what it predicts: image_channels, size, channels (of the levels),
#: num_classes (0 for no labels), prediction and schedule; and of a model of video, frames and
#: patch, the [frames, rows, columns] of a token.
Config = dict[str, Any]

_HEAD_DIM = 32


def make_model(config: Config) -> nn.Module:
    """A U-Net for images, a transformer for video."""
    channels, classes = config["channels"], config["num_classes"]
    sample_shape(config)  # what the file lacks shows here, not later
    check_choice("prediction", config["prediction"], PREDICTIONS)
    check_choice("schedule", config["schedule"], SCHEDULES)
    if "frames" not in config:
        model = SmallUNet(config["image_channels"], channels, num_classes=classes)
        # Convolutions are a tenth faster in this layout.
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DiT(
        dict(
            in_channels=config["image_channels"],
            sample_size=config["size"],
            patch_size=config["patch"],
            num_layers=len(channels),
            num_attention_heads=channels[0] // _HEAD_DIM,
            attention_head_dim=_HEAD_DIM,
            num_embeds_ada_norm=classes,
        )
    )


class ClippedEpsilon(nn.Module):
    """A model of epsilon whose noise is that of an x0 within the range of pixels, [-1, 1].

    At the last timestep of the cosine schedule an error of epsilon is one 20,000 times as large of
    x0, which throws every solver out of what the model has seen. x0 is clipped before guidance, so
    that this may still reach beyond the range.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233: `clip_denoised` of its code.
    """

    def __init__(self, model: nn.Module, schedule: str) -> None:
        super().__init__()
        self.model, self.scheduler = model, Denoising("epsilon", schedule).scheduler()

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        epsilon = self.model(noisy, timesteps, labels)
        each = (-1, *[1] * (noisy.dim() - 1))
        alpha, sigma = (level.view(each) for level in self.scheduler.levels(timesteps))
        x0 = (noisy - sigma * epsilon) / alpha
        clipped = (noisy - alpha * x0.clamp(-1, 1)) / sigma
        return torch.where(x0.abs() > 1, clipped, epsilon).to(epsilon.dtype)


def to_sample_from(model: nn.Module, config: Config) -> nn.Module:
    """The model as solvers are to ask it."""
    epsilon = config["prediction"] == "epsilon"
    return ClippedEpsilon(model, config["schedule"]) if epsilon else model


def sample_shape(config: Config) -> tuple[int, ...]:
    """(channels, [frames,] height, width)"""
    frames = [config["frames"]] if "frames" in config else []
    return (config["image_channels"], *frames, config["size"], config["size"])


def save_model(path: Path, model: nn.Module, config: Config) -> None:
    save_weights(path, model, "diffusion", config)


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, Config]:
    """What `save_model` wrote; ValueError for another file."""
    return load_weights(path, "diffusion", make_model, device)

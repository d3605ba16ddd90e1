"""The VAEs of the command line, as files."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aigc_fast.models.vae import ConvVAE
from aigc_fast.ops._checks import check_choice
from aigc_fast.ops.elbo import LIKELIHOODS

from .weights import load_weights, save_weights

#: What a model is made of and how its output is read: the arguments of ConvVAE, and likelihood.
Config = dict[str, Any]

_NUMBERS = ("size", "image_channels", "channels", "latent_dim", "num_classes")


def make_model(config: Config) -> ConvVAE:
    check_choice("likelihood", config["likelihood"], LIKELIHOODS)
    numbers = {name: config[name] for name in _NUMBERS}
    # Convolutions in bfloat16 take half the time in this layout.
    return ConvVAE(**numbers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_model(path: Path, model: nn.Module, config: Config) -> None:
    save_weights(path, model, "vae", config)


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, Config]:
    """What `save_model` wrote; ValueError for another file."""
    return load_weights(path, "vae", make_model, device)

"""Weights of trained models as files: safetensors, with what they are made of in the header."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast.io._whole import written_whole

from .errors import reading


def save_weights(path: Path, model: nn.Module, family: str, config: dict[str, Any]) -> None:
    """Whole, or what was there before.

    They are rounded to float16, for half the size; a checkpoint to go on from is another file.
    """
    from safetensors.torch import save_file

    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with written_whole(path) as partial:
        save_file(weights, partial, {"aigc_fast": json.dumps({family: config})})


def load_weights(
    path: Path, family: str, make: Callable[[dict[str, Any]], nn.Module], device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that make(config) gives with the weights that `save_weights` wrote, and its config;
    ValueError for another file."""
    from safetensors import safe_open

    with reading(path, f"the model.safetensors of a {family} model"):
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["aigc_fast"])[family]
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = make(config)
        model.load_state_dict(weights)
    return model.to(device).eval(), config

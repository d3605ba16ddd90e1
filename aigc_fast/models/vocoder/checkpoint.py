"""Checkpoints of vocoders as their authors wrote them, not trusted; weight norm folded."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from aigc_fast.io.hf_folder import open_safetensors

#: how torch's two weight norms call the length and the direction of a `weight`
_WEIGHT_NORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def read_state(path: str | os.PathLike[str], member: str) -> dict[str, Tensor]:
    """The floating-point tensors of a checkpoint, on the CPU, weight norm folded.

    path:   a .safetensors file, or what torch.save wrote, of which nothing but tensors is read.
    member: of the checkpoint that holds them, where they are not the whole of it.

    Raises OSError where the file cannot be opened, ValueError where it is unsound.
    """
    if Path(path).suffix == ".safetensors":
        opened = open_safetensors(Path(path))
        found: Any = {name: file.get_tensor(name) for name, file in opened.items()}
    else:
        found = read_torch(path)
        if isinstance(found, dict) and isinstance(found.get(member), dict):
            found = found[member]
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a state dict, got {type(found).__name__}")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()):
            raise ValueError(f"{path}: {name!r} must be a floating-point tensor")
    try:
        return fold_weight_norm(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What torch.save wrote, if it is nothing but tensors, numbers and strings; OSError and
    ValueError as for `read_state`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path}: it holds more than tensors, which could run any code") from None
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        EOFError,
        AttributeError,
    ) as e:
        raise ValueError(f"{path}: not a sound checkpoint: {e}") from None


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with weight = g v / ||v|| for every pair of g and v, of whichever names.

    ||v|| is over all dimensions but the first, as torch's weight norm has it; g is (n, 1, 1).

    Raises ValueError where one of a pair is missing or has no such shape.

    Source: Salimans and Kingma 2016, arXiv:1602.07868.
    """
    folded = dict(state)
    for length, direction in _WEIGHT_NORMS:
        for name in [name for name in folded if name.endswith((f".{length}", f".{direction}"))]:
            stem = name.removesuffix(length).removesuffix(direction)
            g, v = folded.pop(f"{stem}{length}", None), folded.pop(f"{stem}{direction}", None)
            if g is None and v is None:
                continue  # its pair was the other's turn
            if g is None or v is None:
                raise ValueError(f"of {stem}{length} and {stem}{direction} one is missing")
            if v.dim() < 2 or g.shape != (len(v), *[1] * (v.dim() - 1)):
                shapes = f"{tuple(g.shape)} and {tuple(v.shape)}"
                raise ValueError(f"the shapes of {stem}{length} and {stem}{direction}: {shapes}")
            wide = v.to(torch.promote_types(v.dtype, torch.float32))
            norm = wide.flatten(1).norm(dim=1).view_as(g)
            folded[f"{stem}weight"] = (wide * (g / norm)).to(v.dtype)
    return folded

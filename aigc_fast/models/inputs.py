"""What networks take: samples of a shape, timesteps."""

from numbers import Real

import torch
from torch import Tensor


def check_input(name: str, x: object, *sizes: int | str, least: int = 1) -> None:
    """TypeError or ValueError unless x is a tensor (batch, *sizes).

    sizes: a name stands for any number from `least` on.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    fits = x.dim() == 1 + len(sizes) and all(
        found >= least if isinstance(size, str) else found == size
        for found, size in zip(x.shape[1:], sizes, strict=True)
    )
    if not fits:
        named = [f"{size} >= {least}" if isinstance(size, str) else str(size) for size in sizes]
        shape = ", ".join(["batch", *named])
        raise ValueError(f"{name} must have shape ({shape}), got {tuple(x.shape)}")


def timesteps_of(timesteps: Tensor | float, sample: Tensor) -> Tensor:
    """Timesteps (batch,) of a sample; a number, or a tensor of one, is that of all, as diffusers
    has it.

    Raises TypeError or ValueError for what is neither.
    """
    batch = len(sample)
    if isinstance(timesteps, Tensor):
        if timesteps.shape == (batch,):
            return timesteps
        if timesteps.dim() <= 1 and timesteps.numel() == 1:
            return timesteps.to(sample.device).expand(batch)
        found = f"shape {tuple(timesteps.shape)}"
        raise ValueError(f"timesteps must be a number or have shape ({batch},), got {found}")
    if not isinstance(timesteps, Real):
        kind = type(timesteps).__name__
        raise TypeError(f"timesteps must be a number or a torch.Tensor, got {kind}")
    return torch.full((batch,), timesteps, device=sample.device)

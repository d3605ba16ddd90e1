"""add_noise, scale_noise and get_velocity of diffusers' schedulers by one operator.

The kinds of noise levels: `training` by timestep; of the schedule, `sigma` with alpha = 1, `flow`
with alpha = 1 - sigma, and `lambda` as the solvers in log-SNR have them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.schedulers.log_snr import levels_of
from aigc_fast.schedulers.tables import once


def _level_tables(self: Any, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) by timestep of training, or by step of the schedule."""

    def build() -> tuple[Tensor, ...]:
        if kind == "training":
            alphas = self.alphas_cumprod.cpu()
            levels = (alphas**0.5, (1 - alphas) ** 0.5)
        else:
            sigma = self.sigmas.cpu().float()
            if kind == "lambda":
                levels = levels_of(self)[:2]
            elif kind == "flow":
                levels = (1.0 - sigma, sigma)
            else:
                levels = (torch.ones_like(sigma), sigma)
        return tuple(v.to(device, copy=True) for v in levels)  # not the schedule itself

    return once(self, (kind, device), build)


def _step_indices(self: Any, timesteps: Tensor, device: torch.device) -> Tensor | None:
    """Where each timestep stands in the schedule: the second place of one that stands in two."""
    schedule = self.timesteps
    if device.type == "cpu":
        try:
            found = [self.index_for_timestep(t, schedule) for t in timesteps]
        except IndexError:
            return None
        return torch.tensor(found)
    same = timesteps.to(device)[:, None] == schedule.to(device)[None]
    count = same.sum(1, keepdim=True)
    torch._assert_async((count > 0).all())
    return ((same.cumsum(1) == count.clamp(max=2)) & same).int().argmax(1)


def _fits(sample: Any, noise: Any) -> bool:
    return (
        isinstance(sample, Tensor)
        and isinstance(noise, Tensor)
        and sample.is_floating_point()
        and noise.dtype is sample.dtype
        and noise.shape == sample.shape
        and noise.device == sample.device
    )


def _levels(
    self: Any, kind: str, sample: Any, noise: Any, timesteps: Any
) -> tuple[Tensor, Tensor] | None:
    """(alpha, sigma) of each sample, or None where the stock method has to do it."""
    if not _fits(sample, noise) or not isinstance(timesteps, Tensor):
        return None
    device, batch = sample.device, sample.shape[:1]
    if not batch or device.type == "mps":
        return None
    alpha, sigma = _level_tables(self, kind, device)
    if kind == "training":
        index: Tensor | None = timesteps.to(device).flatten()
        if timesteps.is_floating_point():
            return None
    elif self.begin_index is not None:
        step = self.begin_index if self.step_index is None else self.step_index
        index = torch.full(batch, step, device=device)
    else:
        index = _step_indices(self, timesteps, device) if timesteps.dim() == 1 else None
    if index is None:
        return None
    if index.numel() != batch[0]:
        if index.numel() != 1:
            return None
        index = index.expand(batch)
    return alpha[index], sigma[index]


def _add_noise(stock: Callable, kind: str) -> Callable:
    @functools.wraps(stock)
    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Any:
        levels = _levels(self, kind, original_samples, noise, timesteps)
        if levels is None:
            return stock(self, original_samples, noise, timesteps)
        return ops.add_noise(original_samples, noise, *levels)

    return add_noise


def _scale_noise(stock: Callable, kind: str) -> Callable:
    @functools.wraps(stock)
    def scale_noise(self: Any, sample: Tensor, timestep: Any, noise: Any = None) -> Any:
        levels = _levels(self, kind, sample, noise, timestep)
        if levels is None:
            return stock(self, sample, timestep, noise)
        return ops.add_noise(sample, noise, *levels)

    return scale_noise


def _get_velocity(stock: Callable, kind: str) -> Callable:
    @functools.wraps(stock)
    def get_velocity(self: Any, sample: Tensor, noise: Tensor, timesteps: Any) -> Any:
        levels = _levels(self, kind, sample, noise, timesteps) if kind == "training" else None
        if levels is None:
            return stock(self, sample, noise, timesteps)
        alpha, sigma = levels
        return ops.add_noise(noise, sample, alpha, -sigma)

    return get_velocity


#: method -> make(the stock method, the kind of noise levels)
NOISE = {"add_noise": _add_noise, "scale_noise": _scale_noise, "get_velocity": _get_velocity}

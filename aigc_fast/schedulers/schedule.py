"""Noise schedules: the betas of training and the timesteps of inference."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def make_betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """(steps,) fp32: linear, scaled_linear (Rombach et al. 2021) or squaredcos_cap_v2
    (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17)."""
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        return torch.tensor(
            [
                min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999)
                for i in range(steps)
            ],
            dtype=torch.float32,
        )
    raise ValueError(
        f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {schedule!r}"
    )


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last step leaves no signal (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def space_timesteps(spacing: str, train_steps: int, steps: int, offset: int = 0) -> np.ndarray:
    """`steps` of `train_steps` timesteps, falling (table 2 of arXiv:2305.08891)."""
    timesteps: np.ndarray
    if spacing == "linspace":
        timesteps = np.linspace(0, train_steps - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (train_steps // steps) + offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(train_steps, 0, -train_steps / steps)) - 1
    else:
        raise unknown_spacing(spacing)
    return timesteps.astype(np.int64)


def unknown_spacing(spacing: str) -> ValueError:
    return ValueError(f"timestep_spacing must be linspace, leading or trailing, got {spacing!r}")


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")

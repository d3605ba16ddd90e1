"""Noise schedules: the betas of training, the timesteps and the sigmas of inference."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


def make_betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """(steps,) fp32: linear, scaled_linear (Rombach et al. 2021), squaredcos_cap_v2 (Nichol &
    Dhariwal 2021, arXiv:2102.09672, equation 17), sigmoid (Xu et al. 2022), laplace or exp."""
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    if schedule not in BETA_SCHEDULES:
        raise NotImplementedError(
            f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {schedule!r}"
        )

    def alpha_bar(t: float) -> float:
        if schedule == "squaredcos_cap_v2":
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        if schedule == "exp":
            return math.exp(t * -12.0)
        lam = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
        return math.sqrt(math.exp(lam) / (1 + math.exp(lam)))

    return torch.tensor(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)],
        dtype=torch.float32,
    )


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last step leaves no signal (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def space_timesteps(
    spacing: str,
    train_steps: int,
    steps: int | None,
    offset: int = 0,
    *,
    last: int | None = None,
    one_more: bool = False,
    whole: bool = True,
) -> np.ndarray:
    """`steps` of `train_steps` timesteps, falling (table 2 of arXiv:2305.08891).

    last:     the timesteps from here on are left out.
    one_more: one more timestep than asked for is laid out, and the last left out.
    whole:    whether linspace is rounded.
    """
    assert steps is not None
    last = train_steps if last is None else last
    count = steps + one_more
    timesteps: np.ndarray
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, count, dtype=None if whole else np.float32)
        timesteps = (timesteps.round() if whole else timesteps)[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(count) * (last // count))[::-1]
    elif spacing == "trailing":
        timesteps = np.arange(last, 0, -train_steps / steps).round() - 1
    else:
        raise ValueError(f"timestep_spacing must be linspace, leading or trailing, got {spacing!r}")
    if one_more and spacing != "trailing":
        timesteps = timesteps[:-1]
    timesteps = timesteps.astype(np.int64 if whole else np.float32)
    return timesteps + offset if spacing == "leading" else timesteps


def noise_to_signal(alphas_cumprod: Tensor) -> np.ndarray:
    """sigma of each training step where alpha is 1, rising."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()


def sigma_to_timestep(sigmas: np.ndarray, train_sigmas: np.ndarray) -> np.ndarray:
    """The timestep of each of `sigmas`, between two of training by log sigma."""
    logs = np.log(train_sigmas)
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    low = np.searchsorted(logs, log_sigma, side="right") - 1
    low = low.clip(0, len(logs) - 2)
    share = (logs[low] - log_sigma) / (logs[low] - logs[low + 1])
    share = np.clip(share, 0, 1)
    return (1 - share) * low + share * (low + 1)


def karras(low: float, high: float, ramp: Any, rho: float = 7.0) -> Any:
    """Equation 5 of Karras et al. 2022, arXiv:2206.00364: from high to low as ramp goes 0 to 1."""
    inverse_high, inverse_low = high ** (1 / rho), low ** (1 / rho)
    return (inverse_high + ramp * (inverse_low - inverse_high)) ** rho


def respace(
    kind: str, sigmas: np.ndarray, steps: int, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """`steps` sigmas from high to low, by default the first and last of `sigmas`, spaced as by
    Karras (rho 7), exponential (equal in log) or beta (the quantiles of Beta(0.6, 0.6))."""
    low = sigmas[-1].item() if low is None else low
    high = sigmas[0].item() if high is None else high
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        return karras(low, high, ramp)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    import scipy.stats  # scipy is needed by this spacing alone

    return low + scipy.stats.beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Esser et al. 2024, arXiv:2403.03206, equation 23: more of the schedule at high noise."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def falling(timesteps: Sequence[float], below: float) -> None:
    """ValueError unless `timesteps` fall and begin below `below`."""
    if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
        raise ValueError(f"timesteps must be in descending order, got {list(timesteps)}")
    if timesteps[0] >= below:
        raise ValueError(f"timesteps must start before {below}, got {timesteps[0]}")

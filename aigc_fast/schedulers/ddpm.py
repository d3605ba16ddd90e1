"""DDPM, ancestral sampling (Ho et al. 2020, arXiv:2006.11239)."""

import math
from dataclasses import dataclass

import torch

from aigc_fast.schedulers.schedule import one_of
from aigc_fast.schedulers.scheduler import Scheduler, StepCoefficients


@dataclass(kw_only=True)
class DDPMScheduler(Scheduler):
    """variance_type: fixed_small, fixed_small_log or fixed_large."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(
            "variance_type", self.variance_type, ("fixed_small", "fixed_small_log", "fixed_large")
        )

    def coefficients(self, history: int) -> StepCoefficients:
        """Equations 6, 7 and 15, with as many timesteps left out as the schedule does."""
        t = self.timesteps
        alpha = self.alphas_cumprod[t]
        alpha_prev = torch.cat([self.alphas_cumprod[t[1:]], torch.ones(1)])
        ratio = alpha / alpha_prev
        beta = 1 - ratio
        variance = ((1 - alpha_prev) / (1 - alpha) * beta).clamp(min=1e-20)
        std = {
            "fixed_small": variance**0.5,
            "fixed_small_log": torch.exp(0.5 * torch.log(variance)),
            "fixed_large": beta**0.5,
        }[self.variance_type]
        return StepCoefficients(
            *self.x0_of(alpha**0.5, (1 - alpha) ** 0.5),
            clip=self.clip_sample_range if self.clip_sample else math.inf,
            prev_x0=(alpha_prev**0.5 * beta) / (1 - alpha),
            prev_sample=ratio**0.5 * (1 - alpha_prev) / (1 - alpha),
            prev_noise=torch.where(t > 0, std, 0.0),
        )

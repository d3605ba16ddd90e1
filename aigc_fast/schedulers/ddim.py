"""DDIM (Song et al. 2020, arXiv:2010.02502)."""

import math
from dataclasses import dataclass

import torch

from aigc_fast.schedulers.scheduler import Scheduler, StepCoefficients


@dataclass(kw_only=True)
class DDIMScheduler(Scheduler):
    """eta: 0 is deterministic, 1 has the noise of DDPM (diffusers takes it at every step).
    set_alpha_to_one: whether the step behind the last has no noise, or that of timestep 0.
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    eta: float = 0.0

    def coefficients(self, history: int) -> StepCoefficients:
        """Equations 12 and 16."""
        t = self.timesteps
        earlier = t - self.num_train_timesteps // self.num_inference_steps
        final = torch.tensor(1.0) if self.set_alpha_to_one else self.alphas_cumprod[0]
        alpha = self.alphas_cumprod[t]
        alpha_prev = torch.where(earlier >= 0, self.alphas_cumprod[earlier.clamp(min=0)], final)
        variance = ((1 - alpha_prev) / (1 - alpha)) * (1 - alpha / alpha_prev)
        std = self.eta * variance**0.5
        direction = (1 - alpha_prev - std**2) ** 0.5
        epsilon = self.epsilon_of(alpha**0.5, (1 - alpha) ** 0.5)
        return StepCoefficients(
            *self.x0_of(alpha**0.5, (1 - alpha) ** 0.5),
            clip=self.clip_sample_range if self.clip_sample else math.inf,
            prev_x0=alpha_prev**0.5,
            prev_sample=direction * epsilon[0],
            prev_output=direction * epsilon[1],
            prev_noise=std,
        )

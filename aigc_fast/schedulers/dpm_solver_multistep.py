"""DPM-Solver++, multistep (Lu et al. 2022, arXiv:2211.01095)."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from aigc_fast.schedulers.schedule import one_of, unknown_spacing
from aigc_fast.schedulers.scheduler import Scheduler, StepCoefficients


@dataclass(kw_only=True)
class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ of order 1 or 2 ("2M").

    solver_type:       midpoint or heun, for order 2.
    lower_order_final: order 1 in the last step of fewer than 15.
    euler_at_final:    order 1 in the last step of any number.
    final_sigmas_type: zero, or sigma_min (the noise of timestep 0).
    lambda_min_clipped: leaves out timesteps with less log-SNR / 2; needed by squaredcos_cap_v2.
    """

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("solver_order", self.solver_order, (1, 2))
        one_of("solver_type", self.solver_type, ("midpoint", "heun"))
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        if self.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # sigma must be finite

    @property
    def order(self) -> int:
        return self.solver_order

    def space(self, num_inference_steps: int) -> np.ndarray:
        """One more timestep than asked for is laid out, and the last left out."""
        alphas = self.alphas_cumprod
        half_log_snr = torch.log(alphas**0.5) - torch.log((1 - alphas) ** 0.5)
        clipped = torch.searchsorted(half_log_snr.flip(0), self.lambda_min_clipped)
        last = self.num_train_timesteps - int(clipped)
        n = num_inference_steps
        timesteps: np.ndarray
        match self.timestep_spacing:
            case "linspace":
                timesteps = np.linspace(0, last - 1, n + 1).round()[:0:-1]
            case "leading":
                timesteps = np.arange(n, 0, -1) * (last // (n + 1)) + self.steps_offset
            case "trailing":
                timesteps = np.arange(last, 0, -self.num_train_timesteps / n).round() - 1
            case other:
                raise unknown_spacing(other)
        return timesteps.astype(np.int64)

    def coefficients(self, history: int) -> StepCoefficients:
        """Algorithm 2; with no history its first step, in which it equals DDIM."""
        train = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        sigmas = np.interp(self.timesteps.numpy(), np.arange(len(train)), train.numpy())
        final = 0.0 if self.final_sigmas_type == "zero" else train[0].item()
        noise_to_signal = torch.from_numpy(np.append(sigmas, final).astype(np.float32))
        alpha = 1 / (noise_to_signal**2 + 1) ** 0.5
        sigma = noise_to_signal * alpha
        half_log_snr = torch.log(alpha) - torch.log(sigma)
        h = half_log_snr[1:] - half_log_snr[:-1]
        first = alpha[1:] * (torch.exp(-h) - 1.0)
        x0, previous = -first, []
        if history:
            if self.solver_type == "midpoint":
                second = -0.5 * first
            else:
                second = alpha[1:] * ((torch.exp(-h) - 1.0) / h + 1.0)
            # D1 = (x0 - previous x0) / r0; step 0 has no predecessor.
            second[1:] *= 1.0 / (h[:-1] / h[1:])
            second[0] = 0.0
            n = len(h)
            if self.euler_at_final or final == 0 or (self.lower_order_final and n < 15):
                second[-1] = 0.0
            x0, previous = x0 + second, [-second]
        return StepCoefficients(
            *self.x0_of(alpha[:-1], sigma[:-1]),
            prev_x0=x0,
            prev_sample=sigma[1:] / sigma[:-1],
            prev_history=previous,
        )

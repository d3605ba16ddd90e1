"""Schedulers of distilled models, of few steps: LCM (Luo et al. 2023, arXiv:2310.04378), TCD
(Zheng et al. 2024, arXiv:2402.19159) and consistency models (Song et al. 2023, 2303.01469)."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.schedulers.ancestral import alphas, clipping
from aigc_fast.schedulers.diffusion_scheduler import DiffusionScheduler
from aigc_fast.schedulers.linear import NOISE, OUTPUT, SAMPLE, X0, Row, predictions
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.schedule import falling, karras
from aigc_fast.schedulers.scheduler import Scheduler
from aigc_fast.schedulers.tables import steps_of


def _levels(s: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each step: its timestep, the next one, and alphas_cumprod at both."""
    t = s.timesteps.cpu()
    later = torch.cat([t[1:], t[-1:]])
    return t, later, alphas(s, t), alphas(s, later)


# ---- LCM ----------------------------------------------------------------------------------------


def lcm_rows(s: Any) -> Row:
    t, _, alpha, alpha_next = _levels(s)
    x0, _ = predictions(s.config.prediction_type, alpha.sqrt(), (1 - alpha).sqrt())
    scaled, data = t * s.config.timestep_scaling, 0.5
    c_skip = data**2 / (scaled**2 + data**2)
    c_out = scaled / (scaled**2 + data**2) ** 0.5
    denoised = c_out * X0 + c_skip * SAMPLE
    last = torch.arange(len(t)) == s.num_inference_steps - 1
    prev = torch.where(last, 1.0, alpha_next.sqrt()) * denoised
    prev += torch.where(last, 0.0, (1 - alpha_next).sqrt()) * NOISE
    return Row(x0, prev, denoised, **clipping(s))


def lcm_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, lcm_rows)[index]
    noise = None
    if index != s.num_inference_steps - 1:
        noise = draw_noise(output, generator)
    return step(sample, output, noise, **guidance)


@dataclass
class LCMScheduler(DiffusionScheduler):
    """Latent consistency models (arXiv:2310.04378): every step goes to x0, then adds noise.

    original_inference_steps: the steps that the model was distilled with; set_timesteps chooses
        among them.
    timestep_scaling: factor on the timestep in the boundary condition.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    _: KW_ONLY
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    advance: ClassVar = lcm_step
    second_output: ClassVar = "denoised"

    def origin(self, original: int | None, strength: float) -> np.ndarray:
        """The timesteps of the distillation, rising."""
        count = original or self.original_inference_steps
        if count > self.num_train_timesteps:
            raise ValueError(
                f"original_inference_steps must be at most {self.num_train_timesteps}, got {count}"
            )
        skip = self.num_train_timesteps // count
        return np.arange(1, int(count * strength) + 1) * skip - 1

    def lay_out(
        self,
        steps: int | None,
        original_inference_steps: int | None = None,
        timesteps: Any = None,
        strength: float = 1.0,
    ) -> None:
        if timesteps is not None:
            falling(timesteps, self.num_train_timesteps)
            count = len(timesteps)
            first = max(count - min(int(count * strength), count), 0)
            timesteps = np.array(timesteps, dtype=np.int64)[first:]
        else:
            assert steps is not None
            origin = self.origin(original_inference_steps, strength)[::-1]
            most = min(len(origin), original_inference_steps or self.original_inference_steps)
            if steps > most:
                raise ValueError(
                    f"num_inference_steps must be at most {most}, the steps of the distillation "
                    f"(original_inference_steps, strength), got {steps}"
                )
            count = steps
            at = np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(np.int64)
            timesteps = origin[at]
        self.num_inference_steps = count
        self.timesteps = torch.from_numpy(timesteps.astype(np.int64))


# ---- TCD ----------------------------------------------------------------------------------------


def tcd_rows(s: Any, eta: float = 0.3) -> Row:
    t, later, alpha, alpha_next = _levels(s)
    later, alpha_next = later.clone(), alpha_next.clone()
    later[-1], alpha_next[-1] = 0, s.alphas_cumprod[0]
    alpha_s = alphas(s, torch.floor((1 - eta) * later).long())
    x0, epsilon = predictions(s.config.prediction_type, alpha.sqrt(), (1 - alpha).sqrt())
    noised = alpha_s.sqrt() * X0 + (1 - alpha_s).sqrt() * epsilon
    prev = noised
    if eta > 0:
        last = torch.arange(len(t)) == s.num_inference_steps - 1
        ratio = alpha_next / alpha_s
        prev = torch.where(last, 1.0, ratio.sqrt()) * noised
        prev += torch.where(last, 0.0, (1 - ratio).sqrt()) * NOISE
    return Row(x0, prev, noised, **{**clipping(s), "clip": torch.inf, "threshold": None})


def tcd_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, eta: float = 0.3,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if not 0 <= eta <= 1:
        raise AssertionError(f"eta must be in [0, 1], got {eta}")
    step = steps_of(s, sample.device, tcd_rows, eta)[index]
    noise = None
    if eta > 0 and index != s.num_inference_steps - 1:
        noise = draw_noise(output, generator)
    return step(sample, output, noise, **guidance)


@dataclass
class TCDScheduler(LCMScheduler):
    """Trajectory consistency distillation (arXiv:2402.19159).

    step() takes eta, in [0, 1]: the share of noise, 0.3 by default; 0 is deterministic.
    """

    advance: ClassVar = tcd_step
    second_output: ClassVar = "pred_noised_sample"

    def origin(self, original: int | None, strength: float) -> np.ndarray:
        if original is None:
            return super().origin(None, strength)
        return np.arange(int(self.num_train_timesteps * strength))


# ---- consistency models -------------------------------------------------------------------------


def consistency_rows(s: Any) -> Row:
    """Equation 5 and algorithm 1."""
    c, sigma = s.config, s.sigmas[:-1]
    shifted = sigma - c.sigma_min
    c_skip = c.sigma_data**2 / (shifted**2 + c.sigma_data**2)
    c_out = shifted * c.sigma_data / (sigma**2 + c.sigma_data**2) ** 0.5
    later = s.sigmas[1:].clamp(c.sigma_min, c.sigma_max)
    prev = X0 + (c.s_noise * (later**2 - c.sigma_min**2) ** 0.5) * NOISE
    return Row(c_out * OUTPUT + c_skip * SAMPLE, prev, clip=1.0 if c.clip_denoised else torch.inf)


def consistency_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, consistency_rows)[index]
    noise = draw_noise(output, generator) if len(s.timesteps) > 1 else None
    if noise is None and step.noisy:  # a single step ends without noise
        noise = torch.zeros_like(output)
    result = step(sample, output, noise, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


@dataclass
class CMStochasticIterativeScheduler(Scheduler):
    """Multistep sampling of consistency models (arXiv:2303.01469, algorithm 1).

    Timesteps are 250 log sigma.
    """

    num_train_timesteps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    s_noise: float = 1.0
    rho: float = 7.0
    clip_denoised: bool = True

    advance: ClassVar = consistency_step

    @property
    def init_noise_sigma(self) -> float:
        return self.sigma_max

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        sigma = self.sigmas[self._locate(timestep)].item()
        return sample / (sigma**2 + self.sigma_data**2) ** 0.5

    def lay_out(self, steps: int | None, timesteps: Any = None) -> None:
        if timesteps is None:
            assert steps is not None
            timesteps = np.arange(steps)[::-1] * (self.num_train_timesteps // steps)
        else:
            falling(timesteps, self.num_train_timesteps)
        self.num_inference_steps = len(timesteps)
        ramp = np.array(timesteps)[::-1] / (self.num_train_timesteps - 1)
        sigmas = karras(self.sigma_min, self.sigma_max, ramp, self.rho)
        self.timesteps = torch.from_numpy(1000 * 0.25 * np.log(sigmas + 1e-44))
        self.sigmas = torch.from_numpy(np.append(sigmas, self.sigma_min).astype(np.float32))

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (timesteps / 250).exp().float()
        return torch.ones_like(sigma), sigma

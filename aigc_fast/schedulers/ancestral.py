"""DDPM (Ho et al. 2020, arXiv:2006.11239) and DDIM (Song et al. 2020, arXiv:2010.02502)."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers.diffusion_scheduler import DiffusionScheduler
from aigc_fast.schedulers.linear import NOISE, SAMPLE, X0, Form, Row, Threshold, predictions
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.schedule import falling, space_timesteps
from aigc_fast.schedulers.tables import once, steps_of

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned",
             "learned_range")  # fmt: skip


def clipping(s: Any) -> dict[str, Any]:
    """How a row shall clip x0, by the configuration."""
    config = s.config
    if getattr(config, "thresholding", False):
        ratio, most = config.dynamic_thresholding_ratio, config.sample_max_value
        return {"threshold": Threshold(ratio, most)}
    return {"clip": config.clip_sample_range if getattr(config, "clip_sample", False) else math.inf}


def alphas(s: Any, timesteps: Tensor, beyond: Tensor | None = None) -> Tensor:
    """alphas_cumprod at the timesteps, `beyond` before the first."""
    table = s.alphas_cumprod.cpu()
    if beyond is None:
        return table[timesteps]
    return torch.where(timesteps >= 0, table[timesteps.clamp(min=0)], beyond.cpu())


# ---- DDPM ---------------------------------------------------------------------------------------


def ddpm_variances(s: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each step: alphas_cumprod, that of the next, their ratio, and the variance."""
    t = s.timesteps.cpu()
    alpha = alphas(s, t)
    alpha_next = alphas(s, torch.cat([t[1:], t.new_tensor([-1])]), torch.tensor(1.0))
    ratio = alpha / alpha_next
    variance = (1 - alpha_next) / (1 - alpha) * (1 - ratio)
    return alpha, alpha_next, ratio, variance.clamp(min=1e-20)


def ddpm_rows(s: Any) -> Row:
    """Equations 6, 7 and 15, with as many timesteps left out as the schedule does."""
    alpha, alpha_next, ratio, variance = ddpm_variances(s)
    beta = 1 - ratio
    x0, _ = predictions(s.config.prediction_type, alpha**0.5, (1 - alpha) ** 0.5)
    std = {
        "fixed_small": lambda: variance**0.5,
        "fixed_small_log": lambda: torch.exp(0.5 * torch.log(variance)),
        "fixed_large": lambda: beta**0.5,
        "fixed_large_log": lambda: torch.log(beta) ** 0.5,
    }.get(s.variance_type, lambda: torch.ones_like(beta))()
    prev = (alpha_next**0.5 * beta / (1 - alpha)) * X0
    prev += (ratio**0.5 * (1 - alpha_next) / (1 - alpha)) * SAMPLE
    prev += torch.where(s.timesteps.cpu() > 0, std, 0.0) * NOISE
    return Row(x0, prev, **clipping(s))


def ddpm_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, ddpm_rows)[index]
    learned = s.variance_type in ("learned", "learned_range")
    if learned:
        output, variance = output.split(sample.shape[1], 1)
        if guidance.get("uncond_output") is not None:
            guidance = {
                **guidance,
                "uncond_output": guidance["uncond_output"][:, : sample.shape[1]],
            }
    noise = None
    if step.noisy:
        noise = draw_noise(output, generator)
        if learned:
            _, _, ratio, small = (
                v[index] for v in once(s, ddpm_variances, lambda: ddpm_variances(s))
            )
            if s.variance_type == "learned":
                noise = noise * variance**0.5
            else:  # Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15
                share = (variance + 1) / 2
                log = share * torch.log(1 - ratio) + (1 - share) * torch.log(small)
                noise = noise * torch.exp(0.5 * log)
    result = step(sample, output, noise, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


@dataclass
class DDPMScheduler(DiffusionScheduler):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239).

    variance_type: fixed_small, fixed_small_log, fixed_large, learned or learned_range; with the
        last two the model's output has twice the channels of the sample.
    """

    _: KW_ONLY
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False

    rows: ClassVar = ddpm_rows
    advance: ClassVar = ddpm_step
    second_output: ClassVar = "pred_original_sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variance_type", self.variance_type, VARIANCES)
        # As in diffusers it runs through all timesteps where set_timesteps is not called.
        self.set_timesteps(timesteps=range(self.num_train_timesteps)[::-1])

    def lay_out(self, steps: int | None, timesteps: Any = None) -> None:
        if timesteps is None:
            timesteps = space_timesteps(
                self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset
            )
        else:
            falling(timesteps, self.num_train_timesteps)
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.from_numpy(np.array(timesteps, dtype=np.int64))


# ---- DDIM ---------------------------------------------------------------------------------------


def ddim_update(x0: Form, epsilon: Form, alpha_next: Tensor, std: Tensor | float = 0.0) -> Form:
    """Equation 12."""
    direction = (1 - alpha_next - std**2) ** 0.5
    return alpha_next**0.5 * x0 + direction * epsilon + std * NOISE


def ddim_rows(s: Any, eta: float | None = None, use_clipped_model_output: bool = False) -> Row:
    """Equations 12 and 16."""
    t = s.timesteps.cpu()
    earlier = t - s.config.num_train_timesteps // s.num_inference_steps
    final = torch.tensor(1.0) if s.config.set_alpha_to_one else s.alphas_cumprod[0]
    alpha, alpha_next = alphas(s, t), alphas(s, earlier, final)
    std: Tensor | float = 0.0
    eta = s.eta if eta is None else eta
    if eta > 0:
        variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        std = eta * variance**0.5
    x0, epsilon = predictions(s.config.prediction_type, alpha**0.5, (1 - alpha) ** 0.5)
    if use_clipped_model_output:
        epsilon = (SAMPLE - alpha**0.5 * X0) / (1 - alpha) ** 0.5
    return Row(x0, ddim_update(X0, epsilon, alpha_next, std), **clipping(s))


def ddim_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, eta: float | None = None, use_clipped_model_output: bool = False,
    variance_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    eta = s.eta if eta is None else eta
    step = steps_of(s, sample.device, ddim_rows, eta, use_clipped_model_output)[index]
    noise = variance_noise
    if noise is None and eta > 0:
        noise = draw_noise(output, generator)
    result = step(sample, output, noise, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


@dataclass
class DDIMScheduler(DiffusionScheduler):
    """Implicit sampling (Song et al. 2020, arXiv:2010.02502).

    eta: 0 is deterministic, 1 has the noise of DDPM; step() takes it too, as diffusers does.
    set_alpha_to_one: whether the last step ends without noise, or with that of timestep 0.
    """

    _: KW_ONLY
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    eta: float = 0.0
    rescale_betas_zero_snr: bool = False

    rows: ClassVar = ddim_rows
    advance: ClassVar = ddim_step
    second_output: ClassVar = "pred_original_sample"

    def lay_out(self, steps: int | None) -> None:
        assert steps is not None
        self.num_inference_steps = steps
        self.timesteps = torch.from_numpy(
            space_timesteps(
                self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset
            )
        )


def ddim_inverse_rows(s: Any) -> Row:
    """DDIM from less noise to more: from timestep t - ratio to t."""
    t, train = s.timesteps.cpu(), s.config.num_train_timesteps
    initial = torch.tensor(1.0) if s.config.set_alpha_to_one else s.alphas_cumprod[0]
    alpha = alphas(s, (t - train // s.num_inference_steps).clamp(max=train - 1), initial)
    x0, epsilon = predictions(s.config.prediction_type, alpha**0.5, (1 - alpha) ** 0.5)
    return Row(x0, ddim_update(X0, epsilon, alphas(s, t)), **clipping(s))


def ddim_inverse_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, ddim_inverse_rows)[index]
    result = step(sample, output, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


@dataclass
class DDIMInverseScheduler(DiffusionScheduler):
    """DDIM backwards: from an image to the noise from which DDIM makes it."""

    _: KW_ONLY
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    rows: ClassVar = ddim_inverse_rows
    advance: ClassVar = ddim_inverse_step
    second_output: ClassVar = "pred_original_sample"

    def lay_out(self, steps: int | None) -> None:
        assert steps is not None
        check_choice("timestep_spacing", self.timestep_spacing, ("leading", "trailing"))
        self.num_inference_steps = steps
        timesteps = space_timesteps(
            self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset
        )
        self.timesteps = torch.from_numpy(timesteps[::-1].copy())

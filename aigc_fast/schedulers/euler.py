"""Euler's method in sigma, with and without noise (Karras et al. 2022, arXiv:2206.00364)."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers.diffusion_scheduler import SigmaScheduler
from aigc_fast.schedulers.linear import NOISE, OUTPUT, SAMPLE, X0, Form, Row
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.schedule import karras, sigma_to_timestep, space_timesteps
from aigc_fast.schedulers.scheduler import Scheduler
from aigc_fast.schedulers.tables import steps_of


def denoised(s: Any, sigma: Tensor, hat: Tensor | None = None) -> Form:
    """x0 from a sample x0 + sigma * epsilon; hat is the sigma after a churn."""
    config, hat = s.config, sigma if hat is None else hat
    kind = getattr(config, "prediction_type", "epsilon")
    data = getattr(config, "sigma_data", None)
    if data is not None:  # Karras et al., table 1
        c_out = hat * data / (hat**2 + data**2) ** 0.5
        c_out = {"epsilon": c_out, "v_prediction": -c_out}[kind]
        return data**2 / (hat**2 + data**2) * SAMPLE + c_out * OUTPUT
    if kind == "epsilon":
        return SAMPLE - hat * OUTPUT
    if kind == "v_prediction":
        return (-sigma / (sigma**2 + 1) ** 0.5) * OUTPUT + SAMPLE / (sigma**2 + 1)
    if kind in ("sample", "original_sample"):
        return OUTPUT
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {kind!r}")


def slope(x0: Form, sigma: Tensor, clipped: bool = False) -> Form:
    """dx/dsigma. Of an x0 that is not clipped its own form is taken: for epsilon that is the output
    itself, where sample - x0 would cancel."""
    return (SAMPLE - (X0 if clipped else x0)) / sigma


# ---- stochasticity of algorithm 2 ---------------------------------------------------------------


def churned(s: Any, sigma: Tensor, s_churn: float, s_tmin: float, s_tmax: float) -> Tensor:
    """sigma after the churn: noise is added up to it before the step."""
    gamma = min(s_churn / (len(s.sigmas) - 1), 2**0.5 - 1)
    return torch.where((s_tmin <= sigma) & (sigma <= s_tmax), sigma * (gamma + 1), sigma)


def churn(
    s: Any, sigma: Tensor, sample: Tensor, output: Tensor, generator: Generator, s_churn: float,
    s_tmin: float, s_tmax: float, s_noise: float,
) -> Tensor:  # fmt: skip
    sigma = sigma.cpu()
    hat = churned(s, sigma, s_churn, s_tmin, s_tmax)
    if not hat > sigma:
        return sample
    noise = draw_noise(output, generator).to(sample.dtype)
    return torch.add(sample, noise, alpha=s_noise * float((hat**2 - sigma**2) ** 0.5))


# ---- Euler --------------------------------------------------------------------------------------


def euler_rows(s: Any, *churn: float) -> Row:
    sigmas = s.sigmas.cpu()
    sigma = sigmas[:-1]
    hat = churned(s, sigma, *churn) if churn else sigma
    x0 = denoised(s, sigma, hat)
    return Row(x0, SAMPLE + (sigmas[1:] - hat) * slope(x0, hat))


def euler_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if s_churn > 0:
        sample = churn(
            s, s.sigmas[index], sample, output, generator, s_churn, s_tmin, s_tmax, s_noise
        )
        step = steps_of(s, sample.device, euler_rows, s_churn, s_tmin, s_tmax)[index]
    else:
        step = steps_of(s, sample.device, euler_rows)[index]
    result = step(sample, output, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


def ancestral(sigma: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down): going down to `down` and adding noise `up` ends at `later`."""
    up = (later**2 * (sigma**2 - later**2) / sigma**2) ** 0.5
    return up, (later**2 - up**2) ** 0.5


def no_sample_prediction(s: Any) -> None:
    """Solvers whose authors left that out refuse it."""
    if s.config.prediction_type == "sample":
        raise NotImplementedError("prediction_type must be epsilon or v_prediction, got 'sample'")


def euler_ancestral_rows(s: Any) -> Row:
    no_sample_prediction(s)
    sigmas = s.sigmas.cpu()
    sigma = sigmas[:-1]
    up, down = ancestral(sigma, sigmas[1:])
    # Of a long step the difference of squares is rounded below zero.
    down = torch.where(down.isnan(), sigmas[1:] ** 2 / sigma, down)
    x0 = denoised(s, sigma)
    return Row(x0, SAMPLE + (down - sigma) * slope(x0, sigma) + up * NOISE)


def euler_ancestral_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, euler_ancestral_rows)[index]
    noise = draw_noise(output, generator)
    result = step(sample, output, noise, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


# ---- the classes --------------------------------------------------------------------------------


@dataclass
class VarianceExploding(SigmaScheduler):
    """Samples are x0 + sigma * epsilon; the model is given them at variance 1."""

    second_output: ClassVar = "pred_original_sample"

    @property
    def init_noise_sigma(self) -> float:
        highest = self.sigmas.max()
        if self.timestep_spacing in ("linspace", "trailing"):
            return highest.item()
        return ((highest**2 + 1) ** 0.5).item()

    def input_sigma(self, index: int) -> Tensor:
        return self.sigmas[index]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        sigma = self.input_sigma(self._locate(timestep))
        return sample / ((sigma**2 + 1) ** 0.5).item()

    def training_levels(self) -> tuple[Tensor, Tensor]:
        sigma = torch.from_numpy(self.train_sigmas())
        return torch.ones_like(sigma), sigma

    def visit(
        self, steps: int | None, timesteps: Any = None, final: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps, and their sigmas with a last one."""
        train = self.train_sigmas()
        if timesteps is None:
            assert steps is not None
            timesteps = space_timesteps(
                self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset,
                whole=False,
            )  # fmt: skip
        elif spacing := self.spacing():
            raise ValueError(f"timesteps cannot be given with use_{spacing}_sigmas")
        timesteps = np.array(timesteps, dtype=np.float32)
        self.num_inference_steps = len(timesteps)
        sigmas = np.interp(timesteps, np.arange(len(train)), train)
        sigmas = self.interpolated(sigmas)
        respaced = self.respaced(sigmas, len(timesteps))
        if respaced is not None:
            sigmas, timesteps = respaced, sigma_to_timestep(respaced, train)
        return timesteps, np.append(sigmas, final).astype(np.float32)

    def interpolated(self, sigmas: np.ndarray) -> np.ndarray:
        return sigmas


@dataclass
class EulerDiscreteScheduler(VarianceExploding):
    """Euler's method (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its correction).

    step() takes s_churn, s_tmin, s_tmax and s_noise, which add noise before a step.

    interpolation_type: linear, or log_linear between the first and the last sigma of training.
    timestep_type: discrete, or continuous: with v_prediction a timestep is then log(sigma) / 4.
    final_sigmas_type: zero or sigma_min (the noise of timestep 0).
    """

    _: KW_ONLY
    interpolation_type: str = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False

    advance: ClassVar = euler_step

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("interpolation_type", self.interpolation_type, ("linear", "log_linear"))
        check_choice("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        check_choice("timestep_type", self.timestep_type, ("discrete", "continuous"))

    def interpolated(self, sigmas: np.ndarray) -> np.ndarray:
        if self.interpolation_type == "linear":
            return sigmas
        train = self.train_sigmas()
        ends = np.log(train[-1]), np.log(train[0])
        return torch.linspace(*ends, len(sigmas) + 1).exp().numpy()

    def lay_out(self, steps: int | None, timesteps: Any = None, sigmas: Any = None) -> None:
        continuous = self.timestep_type == "continuous" and self.prediction_type == "v_prediction"
        if sigmas is not None:
            sigmas = np.array(sigmas, dtype=np.float32)
            timesteps = sigma_to_timestep(sigmas[:-1], self.train_sigmas())
            self.num_inference_steps = len(timesteps)
        elif timesteps is not None and continuous:
            raise ValueError("timesteps cannot be given with timestep_type='continuous'")
        else:
            lowest = 0.0 if self.final_sigmas_type == "zero" else self.train_sigmas()[0]
            timesteps, sigmas = self.visit(steps, timesteps, lowest)
        self.sigmas = torch.from_numpy(sigmas)
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32))
        if continuous:
            self.timesteps = torch.stack([0.25 * sigma.log() for sigma in self.sigmas[:-1]])


@dataclass
class EulerAncestralDiscreteScheduler(VarianceExploding):
    """Euler's method to a sigma below the next one, then noise up to that one."""

    _: KW_ONLY
    rescale_betas_zero_snr: bool = False

    predictions: ClassVar = ("epsilon", "v_prediction")
    advance: ClassVar = euler_ancestral_step
    use_karras_sigmas: ClassVar[bool] = False  # type: ignore[misc]
    use_exponential_sigmas: ClassVar[bool] = False  # type: ignore[misc]
    use_beta_sigmas: ClassVar[bool] = False  # type: ignore[misc]

    def lay_out(self, steps: int | None) -> None:
        timesteps, sigmas = self.visit(steps)
        self.sigmas, self.timesteps = torch.from_numpy(sigmas), torch.from_numpy(timesteps)


@dataclass
class EDMScheduler(Scheduler):
    """Sigmas and preconditioning of Karras et al.; timesteps are log(sigma) / 4."""

    num_train_timesteps: int = 1000
    _: KW_ONLY
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    prediction_type: str = "epsilon"
    rho: float = 7.0
    final_sigmas_type: str = "zero"

    counts_lists: ClassVar = True

    def __post_init__(self) -> None:
        check_choice("sigma_schedule", self.sigma_schedule, ("karras", "exponential"))
        check_choice("prediction_type", self.prediction_type, ("epsilon", "v_prediction"))
        check_choice("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        self.sigmas = torch.empty(0)
        super().__post_init__()

    @property
    def init_noise_sigma(self) -> float:
        return (self.sigma_max**2 + 1) ** 0.5

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        sigma = self.sigmas[self._locate(timestep)]
        return sample * (1 / (sigma**2 + self.sigma_data**2) ** 0.5).item()

    def spread(self, ramp: Tensor) -> Tensor:
        if self.sigma_schedule == "karras":
            return torch.as_tensor(karras(self.sigma_min, self.sigma_max, ramp, self.rho))
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.linspace(*ends, len(ramp)).exp().flip(0)

    def lay_out(self, steps: int | None, sigmas: Any = None) -> None:
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if sigmas is None else sigmas
        self.finish(self.spread(torch.as_tensor(ramp, dtype=torch.float64)).float())

    def finish(self, sigmas: Tensor) -> None:
        final = sigmas[-1:] if self.final_sigmas_type == "sigma_min" else torch.zeros(1)
        self.num_inference_steps = len(sigmas)
        self.timesteps = 0.25 * torch.log(sigmas)
        self.sigmas = torch.cat([sigmas, final])

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (4 * timesteps).exp()
        return torch.ones_like(sigma), sigma


@dataclass
class EDMEulerScheduler(EDMScheduler):
    """Euler's method for models with the preconditioning of EDM (arXiv:2206.00364).

    step() takes s_churn, s_tmin, s_tmax and s_noise of the paper's algorithm 2.
    """

    advance: ClassVar = euler_step
    second_output: ClassVar = "pred_original_sample"

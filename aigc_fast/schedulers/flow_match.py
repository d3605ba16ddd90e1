"""Flow matching: the sample is (1 - sigma) x0 + sigma * noise, and the model's output is
noise - x0 (Esser et al. 2024, arXiv:2403.03206)."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.ops._checks import check_choice
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.schedulers.diffusion_scheduler import check_spacings, spacing_of
from aigc_fast.schedulers.euler import churn, churned, slope
from aigc_fast.schedulers.linear import NOISE, OUTPUT, SAMPLE, X0, Row, named
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.schedule import respace, shift_sigmas
from aigc_fast.schedulers.scheduler import Scheduler
from aigc_fast.schedulers.tables import steps_of
from aigc_fast.schedulers.two_stage import FIRST, doubled

# ---- rows ---------------------------------------------------------------------------------------


def euler_rows(s: Any) -> Row:
    if getattr(s.config, "stochastic_sampling", False):
        return renoise_rows(s)
    sigmas = s.sigmas.cpu()
    sigma, later = sigmas[:-1], sigmas[1:]
    return Row(SAMPLE - sigma * OUTPUT, SAMPLE + (later - sigma) * OUTPUT)


def renoise_rows(s: Any) -> Row:
    """To x0, and noise up to the next sigma."""
    sigmas = s.sigmas.cpu()
    sigma, later = sigmas[:-1], sigmas[1:]
    return Row(SAMPLE - sigma * OUTPUT, (1.0 - later) * X0 + later * NOISE)


def heun_rows(s: Any, second: bool, *churn: float) -> Row:
    sigmas = s.sigmas.cpu()
    if not second:
        sigma = sigmas[:-1]
        hat = churned(s, sigma, *churn) if churn else sigma
        x0 = SAMPLE - sigma * OUTPUT
        now = slope(x0, hat)
        return Row(x0, SAMPLE + (sigmas[1:] - hat) * now, now)
    sigma, before = sigmas[:-1], sigmas.roll(1)[:-1]
    hat = churned(s, before, *churn) if churn else before
    x0 = SAMPLE - sigma * OUTPUT
    mean = 0.5 * (named("slope") + slope(x0, sigma))
    return Row(x0, FIRST + (sigma - hat) * mean, None, ("first", "slope"))


# ---- steps --------------------------------------------------------------------------------------


def euler_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, euler_rows)[index]
    noise = None
    if step.stochastic:
        noise = draw_noise(sample, generator, wide_dtype(sample.dtype))
    result = step(sample, output, noise, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


def renoise_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    step = steps_of(s, sample.device, renoise_rows)[index]
    noise = draw_noise(sample, generator, wide_dtype(sample.dtype))
    result = step(sample, output, noise, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


def heun_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    second = s.dt is not None
    key: tuple[float, ...] = ()
    if s_churn > 0:
        key = (s_churn, s_tmin, s_tmax)
        sample = churn(
            s, s.sigmas[index - second], sample, output, generator, s_churn, s_tmin, s_tmax,
            s_noise,
        )  # fmt: skip
    step = steps_of(s, sample.device, heun_rows, second, *key)[index]
    if second:
        history = (s.sample, s.prev_derivative)
        s.sample = s.prev_derivative = s.dt = None
        result = step(sample, output, None, history, return_x0=return_x0, **guidance)
        return result if return_x0 else (result, None)
    prev, *x0, s.prev_derivative = step(sample, output, return_x0=return_x0, **guidance)
    s.sample, s.dt = sample, True
    return prev, x0[0] if return_x0 else None


# ---- the classes --------------------------------------------------------------------------------


@dataclass
class FlowMatchScheduler(Scheduler):
    """shift: more of the schedule at high noise. Timesteps are sigma * num_train_timesteps."""

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        rising = np.linspace(
            1, self.num_train_timesteps, self.num_train_timesteps, dtype=np.float32
        )
        sigmas = rising / self.num_train_timesteps
        if not getattr(self, "use_dynamic_shifting", False):
            sigmas = shift_sigmas(sigmas, self.shift)
        self.lowest, self.highest = sigmas[0].item(), sigmas[-1].item()
        self.sigmas = torch.empty(0)
        super().__post_init__()

    def spread(self, steps: int) -> np.ndarray:
        train = self.num_train_timesteps
        return np.linspace(self.highest * train, self.lowest * train, steps) / train

    def add_noise(
        self, sample: Tensor, noise: Tensor, timesteps: Tensor, *, return_velocity: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(1 - sigma) * sample + sigma * noise at each of the timesteps (batch,); the velocity,
        the model's target, is noise - sample."""
        alpha, sigma = self.levels(timesteps)
        if not return_velocity:
            return ops.add_noise(sample, noise, alpha, sigma)
        one = torch.ones_like(sigma)
        return ops.add_noise(sample, noise, alpha, sigma, return_velocity=True, rates=(-one, one))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """diffusers' name and order of arguments for add_noise."""
        return self.add_noise(sample, noise, timestep)  # type: ignore[return-value]

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = timesteps.float() / self.num_train_timesteps
        return 1.0 - sigma, sigma


@dataclass
class ShiftedFlowMatch(FlowMatchScheduler):
    """The arguments that the schedulers of image and video models have.

    use_dynamic_shifting: whether set_timesteps takes mu, the log of the shift (time_shift_type
        exponential) or the shift itself (linear), in place of `shift`.
    shift_terminal: the last sigma before 0, to which the schedule is stretched; None for no
        stretching.
    invert_sigmas: whether to go from x0 to noise.
    """

    _: KW_ONLY
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int | None = 256
    max_image_seq_len: int | None = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: str = "exponential"

    counts_lists: ClassVar = True

    def __post_init__(self) -> None:
        check_spacings(self)
        check_choice("time_shift_type", self.time_shift_type, ("exponential", "linear"))
        super().__post_init__()

    def lay_out(
        self, steps: int | None, sigmas: Any = None, mu: float | None = None, timesteps: Any = None
    ) -> None:
        if self.use_dynamic_shifting and mu is None:
            raise ValueError("mu must be given to set_timesteps for use_dynamic_shifting")
        given = timesteps if sigmas is None else sigmas
        count = steps if given is None else len(given)
        assert count is not None
        if sigmas is not None:
            sigmas = np.array(sigmas).astype(np.float32)
        elif timesteps is not None:
            sigmas = np.array(timesteps).astype(np.float32) / self.num_train_timesteps
        else:
            sigmas = self.spread(count)
        if self.use_dynamic_shifting:
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu  # type: ignore[arg-type]
            sigmas = factor / (factor + (1 / sigmas - 1) ** 1.0)
        else:
            sigmas = shift_sigmas(sigmas, self.shift)
        if self.shift_terminal:
            signal = 1 - sigmas
            sigmas = 1 - signal / (signal[-1] / (1 - self.shift_terminal))
        kind = spacing_of(self)
        if kind is not None:
            sigmas = respace(kind, sigmas, count)
        values = torch.from_numpy(np.asarray(sigmas)).float()
        if self.invert_sigmas:
            values = 1.0 - values
        self.num_inference_steps = count
        self.timesteps = values * self.num_train_timesteps
        if timesteps is not None and not self.invert_sigmas:
            self.timesteps = torch.from_numpy(np.array(timesteps).astype(np.float32))
        self.sigmas = torch.cat([values, torch.full((1,), float(self.invert_sigmas))])


@dataclass
class FlowMatchEulerDiscreteScheduler(ShiftedFlowMatch):
    """Euler's method for flow matching (arXiv:2403.03206).

    shift: above 1 more of the steps are at high noise.
    use_dynamic_shifting, shift_terminal, invert_sigmas: as for `ShiftedFlowMatch`.
    stochastic_sampling: every step goes to x0, and adds noise up to the next sigma.
    """

    _: KW_ONLY
    stochastic_sampling: bool = False

    advance: ClassVar = euler_step


def growing_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """renoise_step, of which the first steps may enlarge x0 before the noise."""
    factors = s.scale_factors
    if index == 0:
        s.first_size = sample.shape[2:]
    if not factors or index >= len(factors):
        return renoise_step(s, index, sample, output, generator, return_x0, guidance)
    row = steps_of(s, sample.device, euler_rows)[index]
    x0 = row(sample, output, return_x0=True, **guidance)[1]
    size = [round(factors[index] * length) for length in s.first_size]
    x0 = torch.nn.functional.interpolate(x0, size=size, mode=s.upscale_mode)
    noise = draw_noise(x0, generator, wide_dtype(x0.dtype))
    later = s.sigmas[index + 1].item()
    return (1.0 - later) * x0 + later * noise, x0


@dataclass
class FlowMatchLCMScheduler(ShiftedFlowMatch):
    """The sampler of consistency-distilled flow models: every step goes to x0 and adds noise.

    scale_factors: for each of the first steps, the size of x0 relative to that of the first sample.
    upscale_mode: the mode of torch.nn.functional.interpolate that enlarges x0.
    """

    _: KW_ONLY
    scale_factors: list[float] | None = None
    upscale_mode: str | None = "bicubic"

    advance: ClassVar = growing_step


@dataclass
class FlowMatchHeunDiscreteScheduler(FlowMatchScheduler):
    """Heun's method for flow matching: second order; every timestep but the first comes twice.

    step() takes s_churn, s_tmin, s_tmax and s_noise, which add noise before a step.
    """

    order: ClassVar = 2
    advance: ClassVar = heun_step

    def forget(self) -> None:
        self.prev_derivative = self.sample = self.dt = None

    def lay_out(self, steps: int | None) -> None:
        assert steps is not None
        sigmas = torch.from_numpy(shift_sigmas(self.spread(steps), self.shift)).float()
        with_last = torch.cat([sigmas, torch.zeros(1)])
        self.num_inference_steps = steps
        self.sigmas = doubled(with_last)
        self.timesteps = doubled(with_last * self.num_train_timesteps)[:-1]

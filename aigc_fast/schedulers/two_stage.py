"""Solvers that ask the model twice for a step: Heun's method (Karras et al. 2022, algorithm 1),
and DPM-Solver-2 with and without noise (algorithm 2 of k-diffusion's sampling)."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.schedulers.ancestral import clipping
from aigc_fast.schedulers.euler import (
    VarianceExploding,
    ancestral,
    denoised,
    no_sample_prediction,
    slope,
)
from aigc_fast.schedulers.linear import NOISE, SAMPLE, Row, named
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.schedule import sigma_to_timestep
from aigc_fast.schedulers.scheduler import is_as_returned
from aigc_fast.schedulers.tables import steps_of

#: sample and x0 of the first stage
FIRST, FIRST_X0 = named("first"), named("first_x0")


def doubled(values: Tensor) -> Tensor:
    """The first and last once, the others for both of their stages."""
    return torch.cat([values[:1], values[1:-1].repeat_interleave(2), values[-1:]])


# ---- Heun ---------------------------------------------------------------------------------------


def heun_rows(s: Any, second: bool, at_prev: bool = False) -> Row:
    """The rows of first stages, from sigmas[i] to sigmas[i + 1], or those of second stages, which
    stand at sigmas[i] and begin anew at sigmas[i - 1]; `at_prev` if their sample is what the first
    returned, which tells the first derivative."""
    sigmas, clips = s.sigmas.cpu(), clipping(s)
    sigma, before = sigmas[:-1], sigmas.roll(1)[:-1]
    x0 = denoised(s, sigma)
    derivative = slope(x0, sigma, clipped=s.config.clip_sample)
    if not second:
        return Row(x0, SAMPLE + (sigmas[1:] - sigma) * derivative, **clips)
    half = (sigma - before) / 2
    if at_prev:
        return Row(x0, 0.5 * (FIRST + SAMPLE) + half * derivative, None, ("first",), **clips)
    derivative = (FIRST - FIRST_X0) / before + derivative
    return Row(x0, FIRST + half * derivative, None, ("first", "first_x0"), **clips)


def heun_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if s.dt is None:
        step = steps_of(s, sample.device, heun_rows, False)[index]
        prev, x0 = step(sample, output, return_x0=True, **guidance)
        # What diffusers keeps here is the derivative, which x0 and the sample determine.
        s.prev_derivative, s.sample, s.dt = x0, sample, prev
        return prev, x0
    at_prev = is_as_returned(sample, s.dt)
    step = steps_of(s, sample.device, heun_rows, True, at_prev)[index]
    history = (s.sample,) if at_prev else (s.sample, s.prev_derivative)
    s.prev_derivative = s.sample = s.dt = None
    result = step(sample, output, None, history, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


@dataclass
class HeunDiscreteScheduler(VarianceExploding):
    """Heun's method in sigma: second order; every timestep but the first comes twice."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    _: KW_ONLY
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    order: ClassVar = 2
    advance: ClassVar = heun_step

    def forget(self) -> None:
        self.prev_derivative = self.sample = self.dt = None

    def lay_out(self, steps: int | None, timesteps: Any = None) -> None:
        timesteps, sigmas = self.visit(steps, timesteps)
        self.sigmas = doubled(torch.from_numpy(sigmas))
        self.timesteps = doubled(torch.from_numpy(np.append(timesteps, 0)))[:-1].float()


# ---- DPM-Solver-2 -------------------------------------------------------------------------------


def kdpm2_rows(s: Any, second: bool) -> Row:
    """First stages go to sigmas_interpol, between sigmas[i] and sigmas[i + 1] by their logs."""
    no_sample_prediction(s)
    sigmas, between = s.sigmas.cpu(), s.sigmas_interpol.cpu()
    if not second:
        sigma = sigmas[:-1]
        x0 = denoised(s, sigma)
        return Row(x0, SAMPLE + (between[1:] - sigma) * slope(x0, sigma))
    at = between[:-1]
    x0 = denoised(s, at)
    prev = FIRST + (sigmas - sigmas.roll(1))[:-1] * slope(x0, at)
    return Row(x0, prev, history=("first",))


def kdpm2_ancestral_rows(s: Any, second: bool) -> Row:
    no_sample_prediction(s)
    sigmas, between = s.sigmas.cpu(), s.sigmas_interpol.cpu()
    if not second:
        sigma = sigmas[:-1]
        x0 = denoised(s, sigma)
        return Row(x0, SAMPLE + (between[:-1] - sigma) * slope(x0, sigma))
    before = [v.cpu().roll(1)[:-1] for v in (s.sigmas, s.sigmas_interpol, s.sigmas_down,
                                             s.sigmas_up)]  # fmt: skip
    sigma, at, down, up = before
    x0 = denoised(s, at)
    prev = FIRST + (down - sigma) * slope(x0, at) + up * NOISE
    return Row(x0, prev, history=("first",))


def kdpm2_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, rows: Any = kdpm2_rows,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    second = s.sample is not None
    step = steps_of(s, sample.device, rows, second)[index]
    noise: Tensor | None = None
    history: tuple[Tensor, ...] = ()
    if second:
        if rows is kdpm2_ancestral_rows:
            noise = draw_noise(output, generator)
        history, s.sample = (s.sample,), None
    else:
        s.sample = sample
    result = step(sample, output, noise, history, return_x0=return_x0, **guidance)
    return result if return_x0 else (result, None)


def kdpm2_ancestral_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return kdpm2_step(
        s, index, sample, output, generator, return_x0, guidance, kdpm2_ancestral_rows
    )


@dataclass
class KDPM2DiscreteScheduler(VarianceExploding):
    """DPM-Solver-2 in sigma: second order, by the midpoint in log sigma."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    order: ClassVar = 2
    predictions: ClassVar = ("epsilon", "v_prediction")
    advance: ClassVar = kdpm2_step

    def forget(self) -> None:
        self.sample: Tensor | None = None

    def input_sigma(self, index: int) -> Tensor:
        return (self.sigmas if self.sample is None else self.sigmas_interpol)[index]

    def lay_out(self, steps: int | None) -> None:
        timesteps, values = self.visit(steps)
        if self.use_karras_sigmas:
            timesteps = timesteps.round()
        sigmas = torch.from_numpy(values)
        self.sigmas = self.doubled(sigmas)
        stages = self.interpolate(sigmas)
        between = sigma_to_timestep(stages.numpy(), self.train_sigmas()).astype(timesteps.dtype)
        self.timesteps = self.interleave(torch.from_numpy(timesteps), torch.from_numpy(between))

    @staticmethod
    def doubled(values: Tensor) -> Tensor:
        return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])

    def interpolate(self, sigmas: Tensor) -> Tensor:
        between = sigmas.log().lerp(sigmas.roll(1).log(), 0.5).exp()
        self.sigmas_interpol = self.doubled(between)
        return between

    @staticmethod
    def interleave(timesteps: Tensor, between: Tensor) -> Tensor:
        pairs = torch.stack((between[1:-1], timesteps[1:]), dim=-1).flatten()
        return torch.cat([timesteps[:1], pairs])


@dataclass
class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 to a sigma below the next one, then noise up to that one."""

    advance: ClassVar = kdpm2_ancestral_step  # type: ignore[assignment]

    def input_sigma(self, index: int) -> Tensor:
        return self.sigmas[index] if self.sample is None else self.sigmas_interpol[index - 1]

    def interpolate(self, sigmas: Tensor) -> Tensor:
        later = sigmas.roll(-1)
        later[-1] = 0.0
        up, down = ancestral(sigmas, later)
        down[-1] = 0.0
        between = sigmas.log().lerp(down.log(), 0.5).exp()
        between[-2:] = 0.0
        if between.isnan().any():  # of a square that rounding has made zero, or less
            raise ValueError(
                f"num_inference_steps must be other than {len(sigmas) - 1}, or the betas or their "
                "timestep_spacing: two of the sigmas are too far apart for float32"
            )
        self.sigmas_interpol, self.sigmas_up, self.sigmas_down = map(
            self.doubled, (between, up, down)
        )
        return between

    @staticmethod
    def interleave(timesteps: Tensor, between: Tensor) -> Tensor:
        pairs = torch.stack((between[:-2], timesteps[1:]), dim=-1).flatten()
        return torch.cat([timesteps[:1], pairs])

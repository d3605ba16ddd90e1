"""What all solvers share: a table of coefficients, made once, and a step that reads one row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.schedulers.schedule import (
    make_betas,
    one_of,
    rescale_zero_terminal_snr,
    space_timesteps,
)


class StepCoefficients(NamedTuple):
    """A row of ops.scheduler_step, in its order:

        x0   = clamp(x0_sample * sample + x0_output * model_output, -clip, clip)
        prev = prev_x0 * x0 + prev_sample * sample + prev_output * model_output
               + prev_noise * noise + sum_k prev_history[k] * history[k]

    Each is a number, or a tensor with a value for each step; history[0] is the last x0.
    """

    x0_sample: float | Tensor
    x0_output: float | Tensor
    clip: float | Tensor = math.inf
    prev_x0: float | Tensor = 0.0
    prev_sample: float | Tensor = 0.0
    prev_output: float | Tensor = 0.0
    prev_noise: float | Tensor = 0.0
    prev_history: Sequence[float | Tensor] = ()

    def table(self, steps: int) -> Tensor:
        """(steps, 7 + len(prev_history)) fp32"""
        columns = [*self[:-1], *self.prev_history]
        return torch.stack(
            [torch.as_tensor(c, dtype=torch.float32).expand(steps) for c in columns], dim=1
        )


@dataclass(kw_only=True)
class Scheduler:
    """The schedule and the loop; a solver adds `coefficients` and the fields it needs.

    Fields have the names and meaning of diffusers' constructor arguments. Coefficients are
    computed in fp32 in diffusers' order of operations: its published results depend on how they
    round. `set_timesteps` makes all rows at once; a step is one call of ops.scheduler_step, does
    no arithmetic on scalars and never waits for the device.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        one_of("prediction_type", self.prediction_type, ("epsilon", "sample", "v_prediction"))
        one_of("timestep_spacing", self.timestep_spacing, ("linspace", "leading", "trailing"))
        if self.trained_betas is None:
            betas = make_betas(
                self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps
            )
        else:
            betas = torch.as_tensor(self.trained_betas, dtype=torch.float32)
        if self.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self._noise_scales: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self._steps: list[int] = []
        self.set_begin_index(0)

    # ---- what a solver defines ----------------------------------------------------------------

    @property
    def order(self) -> int:
        """A step reads its own x0 and up to order - 1 earlier ones."""
        return 1

    def coefficients(self, history: int) -> StepCoefficients:
        """The rows of all steps of self.timesteps where `history` earlier x0 are at hand."""
        raise NotImplementedError

    def space(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps to visit."""
        return space_timesteps(
            self.timestep_spacing, self.num_train_timesteps, num_inference_steps, self.steps_offset
        )

    # ---- the loop -----------------------------------------------------------------------------

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Lays out the timesteps and their rows of coefficients on the device of the samples."""
        if not 0 < num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be in [1, {self.num_train_timesteps}], "
                f"got {num_inference_steps}"
            )
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(self.space(num_inference_steps))
        self._steps = self.timesteps.tolist()
        n = len(self._steps)
        tables = [self.coefficients(k).table(n) for k in range(self.order)]
        self._noisy = (tables[0][:, 6] != 0).tolist()
        # Row tensors are cut here: indexing the table would cost more than the step's own call.
        self._rows = [table.to(device).unbind() for table in tables]
        self._table = tables[0].to(device)
        index_of = torch.zeros(self.num_train_timesteps, dtype=torch.int64)
        index_of[self.timesteps] = torch.arange(n)
        self._index_of = index_of.to(device)
        self.timesteps = self.timesteps.to(device)
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int) -> None:
        """The next step is that of timesteps[begin_index], with no history."""
        self._next = begin_index
        self._history: tuple[Tensor, ...] = ()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        return_x0: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sample at the previous timestep, or (that sample, the predicted x0).

        timestep: one of self.timesteps. One that lies on another device than the CPU is not read
            (that would wait for the device): the call takes the next step in order. A solver
            without history takes a tensor (batch,) too, with a timestep for each sample.
        generator: draws the noise of stochastic solvers, on its own device.
        For the other arguments see ops.scheduler_step.
        """
        if isinstance(timestep, Tensor) and timestep.dim() == 1 and self.order == 1:
            index, noisy = self._next, any(self._noisy)
            row = self._table[self._index_of[timestep]]
        else:
            index = self._locate(timestep)
            if index != self._next:  # a new start: the history belongs to other steps
                self._history = ()
            self._next = index + 1
            noisy, row = self._noisy[index], self._rows[len(self._history)][index]
        keep = self.order > 1
        result = ops.scheduler_step(
            sample,
            model_output,
            row,
            noise=_randn_like(model_output, generator) if noisy else None,
            history=self._history,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            return_x0=keep or return_x0,
        )
        if keep:
            self._history = (result[1], *self._history)[: self.order - 1]
            return result if return_x0 else result[0]
        return result

    def _locate(self, timestep: int | Tensor) -> int:
        index = self._next
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu" and index < len(self._steps):
                return index
            timestep = int(timestep)
        if index < len(self._steps) and self._steps[index] == timestep:
            return index
        if timestep not in self._steps:
            raise ValueError(
                f"timestep must be one of the {len(self._steps)} of set_timesteps, got {timestep}"
            )
        return self._steps.index(timestep)

    # ---- training -----------------------------------------------------------------------------

    def add_noise(
        self, sample: Tensor, noise: Tensor, timesteps: Tensor, *, return_velocity: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """sample at the noise level of each of the timesteps (batch,), and the v target of it.

        The noise levels are those of training, whatever set_timesteps was given.
        """
        scales = self._noise_scales.get(sample.device)
        if scales is None:
            alphas = self.alphas_cumprod
            scales = ((alphas**0.5).to(sample.device), ((1 - alphas) ** 0.5).to(sample.device))
            self._noise_scales[sample.device] = scales
        alpha, sigma = (s.index_select(0, timesteps) for s in scales)
        return ops.add_noise(sample, noise, alpha, sigma, return_velocity=return_velocity)

    # ---- what solvers have in common ------------------------------------------------------------

    def x0_of(self, alpha: Tensor, sigma: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Factors of (sample, model_output) in x0, where sample = alpha * x0 + sigma * epsilon."""
        match self.prediction_type:
            case "epsilon":
                return 1 / alpha, -(sigma / alpha)
            case "sample":
                return 0.0, 1.0
            case _:
                return alpha, -sigma

    def epsilon_of(self, alpha: Tensor, sigma: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Factors of (sample, model_output) in epsilon."""
        match self.prediction_type:
            case "epsilon":
                return 0.0, 1.0
            case "sample":
                return 1 / sigma, -(alpha / sigma)
            case _:
                return sigma, alpha


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device)
    return noise if device == x.device else noise.to(x.device)

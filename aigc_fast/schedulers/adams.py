"""Linear multistep methods: PNDM (Liu et al. 2022, arXiv:2202.09778), IPNDM and LMS."""

import functools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers.ancestral import alphas
from aigc_fast.schedulers.diffusion_scheduler import DiffusionScheduler
from aigc_fast.schedulers.euler import VarianceExploding, denoised, slope
from aigc_fast.schedulers.linear import (
    OUTPUT,
    SAMPLE,
    Form,
    Mixed,
    Row,
    began,
    histories,
    named,
    predictions,
)
from aigc_fast.schedulers.noise import Generator
from aigc_fast.schedulers.schedule import space_timesteps
from aigc_fast.schedulers.scheduler import Scheduler
from aigc_fast.schedulers.tables import steps_of

#: Adams-Bashforth, the newest first
ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
EARLIER = ("h1", "h2", "h3")


def adams(newest: Form, count: int) -> Form:
    """The derivative of the next step from `newest` and count - 1 earlier ones."""
    total = ADAMS[count][0] * newest
    for scale, name in zip(ADAMS[count][1:], EARLIER, strict=False):
        total += scale * named(name)
    return total


def newest_first(kept: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    return kept[: -count - 1 : -1]


# ---- PNDM ---------------------------------------------------------------------------------------


def pndm_update(s: Any, t: Tensor, later: Tensor, base: Form, slope: Form) -> Form:
    """Equation 11, from t to `later`; with v_prediction the slope is that of v."""
    final = torch.tensor(1.0) if s.config.set_alpha_to_one else s.alphas_cumprod[0]
    alpha, alpha_next = alphas(s, t), alphas(s, later, final)
    if s.config.prediction_type == "v_prediction":
        slope = alpha**0.5 * slope + (1 - alpha) ** 0.5 * base
    elif s.config.prediction_type != "epsilon":
        check_choice("prediction_type", s.config.prediction_type, ("epsilon", "v_prediction"))
    root = (alpha * (1 - alpha) * alpha_next) ** 0.5
    denominator = alpha * (1 - alpha_next) ** 0.5 + root
    return (alpha_next / alpha) ** 0.5 * base - (alpha_next - alpha) * slope / denominator


def _pndm_x0(s: Any, t: Tensor) -> Form:
    alpha = alphas(s, t)
    return predictions(s.config.prediction_type, alpha**0.5, (1 - alpha) ** 0.5)[0]


def plms_rows(s: Any, start: int) -> Mixed:
    """The rows of a loop that begins at step `start`, but for its second call."""
    t, x0 = s.timesteps.cpu(), _pndm_x0(s, s.timesteps.cpu())
    later = t - s.config.num_train_timesteps // s.num_inference_steps
    orders = [1 + earlier for earlier in histories(len(t), start, 3)]
    orders = [orders[0], *orders[:-1]]
    rows = {
        order: Row(
            x0, pndm_update(s, t, later, SAMPLE, adams(OUTPUT, order)), history=EARLIER[: order - 1]
        )
        for order in set(orders)
    }
    return Mixed(rows, orders)


def plms_second_rows(s: Any) -> Row:
    """The second call repeats the first step, with the mean of two slopes."""
    t = s.timesteps.cpu()
    ratio = s.config.num_train_timesteps // s.num_inference_steps
    earlier = (t + ratio).clamp(max=s.config.num_train_timesteps - 1)
    prev = pndm_update(s, earlier, t, named("first"), (OUTPUT + named("h1")) / 2)
    return Row(_pndm_x0(s, t), prev, history=("h1", "first"))


RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def prk_rows(s: Any) -> Row:
    """Pseudo Runge-Kutta: four stages a step, whose slopes add up in the second result."""
    t, n = s.timesteps.cpu(), s.config.num_train_timesteps // s.num_inference_steps // 2
    count = torch.arange(len(t))
    stage = count % 4
    begin = t[count // 4 * 4]
    later = t - torch.where(count % 2 == 1, 0, n)
    first, last = (stage == 0).float(), (stage == 3).float()
    base = first * SAMPLE + (1 - first) * named("first")
    weight = torch.tensor(RUNGE_KUTTA)[stage]
    total = (1 - first) * named("total") + weight * OUTPUT
    slope = last * total + (1 - last) * OUTPUT
    prev = pndm_update(s, begin, later, base, slope)
    return Row(_pndm_x0(s, t), prev, total, history=("total", "first"))


def pndm_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    ets, x0 = s.ets, None
    if guidance and s.counter != 1:  # the slope that is kept is the guided one
        output = guided(output, **guidance)
        guidance = {}
    if s.counter < len(s.prk_timesteps) and not s.config.skip_prk_steps:
        step = steps_of(s, sample.device, prk_rows)[index]
        stage = s.counter % 4
        if stage == 0:
            ets.append(output)
            s.cur_sample = sample
        stages = (s.cur_model_output, s.cur_sample)  # neither is read in stage 0
        prev, *x0s, total = step(sample, output, None, stages, return_x0=return_x0, **guidance)
        s.cur_model_output = 0 if stage == 3 else total  # diffusers' name of the sum of slopes
        x0 = x0s[0] if return_x0 else None
    else:
        if s.counter == 1:
            step = steps_of(s, sample.device, plms_second_rows)[index]
            history: Sequence[Tensor] = (ets[-1], s.cur_sample)
            s.cur_sample = None
        else:
            history = newest_first(ets, 3)
            # After the second call, which repeats it, the first step is the one before.
            start = began(max(index - 1, 0), len(history), 3)
            step = steps_of(s, sample.device, plms_rows, start)[index]
            del ets[:-3]
            ets.append(output)
            if s.counter == 0:
                s.cur_sample = sample
        result = step(sample, output, None, history, return_x0=return_x0, **guidance)
        prev, x0 = result if return_x0 else (result, None)
    s.counter += 1
    return prev, x0


@functools.cache  # copied from the host once: neither a wait in a step nor in a CUDA graph
def _output_row(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0.0, 1.0, math.inf, 0.0, 0.0, 1.0, 0.0], device=device)


def guided(
    output: Tensor, uncond_output: Tensor, guidance_scale: float, guidance_rescale: float
) -> Any:
    """The guided output itself, for a solver that keeps it."""
    return ops.scheduler_step(
        output, output, _output_row(output.device), uncond_output=uncond_output,
        guidance_scale=guidance_scale, guidance_rescale=guidance_rescale,
    )  # fmt: skip


@dataclass
class PNDMScheduler(DiffusionScheduler):
    """skip_prk_steps: begins with PLMS, not with three Runge-Kutta steps (twelve calls)."""

    _: KW_ONLY
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    predictions: ClassVar = ("epsilon", "v_prediction")
    advance: ClassVar = pndm_step

    def set_begin_index(self, begin_index: int = 0) -> None:
        # Three Runge-Kutta steps; the later calls of one need what the first has kept.
        if not self.skip_prk_steps and begin_index < 12 and begin_index % 4:
            raise ValueError(
                "begin_index must be 0, 4, 8, or 12 and more without skip_prk_steps, where a loop "
                f"begins with Runge-Kutta steps of four calls, got {begin_index}"
            )
        super().set_begin_index(begin_index)

    def forget(self) -> None:
        self.ets: list[Tensor] = []
        self.counter = self._step_index
        self.cur_sample: Tensor | None = None
        self.cur_model_output: Tensor | int = 0

    def lay_out(self, steps: int | None) -> None:
        assert steps is not None
        train = self.num_train_timesteps
        rising = space_timesteps(self.timestep_spacing, train, steps, self.steps_offset)[::-1]
        if self.skip_prk_steps:
            prk = np.array([], dtype=np.int64)
            plms = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        else:
            order = 4
            if steps < order:
                raise ValueError(
                    f"num_inference_steps must be at least {order} without skip_prk_steps, "
                    f"got {steps}"
                )
            prk = rising[-order:].repeat(2) + np.tile([0, train // steps // 2], order)
            prk = prk[:-1].repeat(2)[1:-1][::-1]
            plms = rising[:-3][::-1]
        self.num_inference_steps = steps
        self.prk_timesteps = prk
        self.timesteps = torch.from_numpy(np.concatenate([prk, plms]).astype(np.int64))


# ---- IPNDM --------------------------------------------------------------------------------------


def ipndm_rows(s: Any, start: int) -> Mixed:
    """The rows of a loop that begins at step `start`."""
    alpha, sigma = s.alphas.cpu(), s.betas.cpu()
    alpha_next, sigma_next = alpha[1:], sigma[1:]
    alpha, sigma = alpha[:-1], sigma[:-1]
    slope = sigma * SAMPLE + alpha * OUTPUT
    x0 = alpha * SAMPLE - sigma * OUTPUT
    floor = alpha.clamp(min=1e-8)

    def row(order: int) -> Row:
        mean = adams(slope, order)
        prev = alpha_next * ((SAMPLE - sigma * mean) / floor) + sigma_next * mean
        return Row(x0, prev, slope, EARLIER[: order - 1])

    orders = [1 + earlier for earlier in histories(len(alpha), start, 3)]
    return Mixed({order: row(order) for order in set(orders)}, orders)


def ipndm_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    history = newest_first(s.ets, 3)
    step = steps_of(s, sample.device, ipndm_rows, began(index, len(history), 3))[index]
    prev, *x0, slope = step(sample, output, None, history, return_x0=return_x0, **guidance)
    s.ets.append(slope)
    return prev, x0[0] if return_x0 else None


@dataclass
class IPNDMScheduler(Scheduler):
    """PLMS on the schedule of v-diffusion: alpha = cos, sigma = sin of timestep * pi / 2, so far
    as those have no other betas."""

    num_train_timesteps: int = 1000
    trained_betas: Sequence[float] | None = None

    advance: ClassVar = ipndm_step

    def forget(self) -> None:
        self.ets: list[Tensor] = []

    def lay_out(self, steps: int | None) -> None:
        assert steps is not None
        if self.trained_betas is not None:
            self.betas = torch.tensor(self.trained_betas, dtype=torch.float32)
        else:
            ramp = torch.cat([torch.linspace(1, 0, steps + 1)[:-1], torch.zeros(1)])
            self.betas = torch.sin(ramp * math.pi / 2) ** 2
        self.alphas = (1.0 - self.betas**2) ** 0.5
        self.num_inference_steps = steps
        self.timesteps = (torch.atan2(self.betas, self.alphas) / math.pi * 2)[:-1]


# ---- LMS ----------------------------------------------------------------------------------------


def lms_weights(sigmas: np.ndarray, count: int, order: int) -> np.ndarray:
    """(order, count): the integral from sigmas[i] to sigmas[i + 1] of the Lagrange polynomial of
    sigmas[i - j] among the last `order`; four nodes integrate a cubic exactly."""
    index = np.arange(count)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    low, high = sigmas[index], sigmas[index + 1]
    tau = (high + low) / 2 + (high - low) / 2 * nodes[:, None]
    past = [sigmas[index - k] for k in range(order)]
    result = np.empty((order, count))
    for j in range(order):
        product = np.ones_like(tau)
        for k in range(order):
            if k != j:
                product = product * (tau - past[k]) / (past[j] - past[k])
        result[j] = (high - low) / 2 * (weights @ product)
    return result


def lms_rows(s: Any, order: int, count: int) -> Row:
    sigmas = s.sigmas.cpu()
    sigma = sigmas[:-1]
    x0 = denoised(s, sigma)
    derivative = slope(x0, sigma)
    weights = torch.from_numpy(lms_weights(sigmas.double().numpy(), len(sigma), order)).float()
    prev = SAMPLE + weights[0] * derivative
    for weight, name in zip(weights[1:count], EARLIER, strict=False):
        prev += weight * named(name)
    return Row(x0, prev, derivative, EARLIER[: count - 1])


def lms_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, order: int = 4,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    check_choice("order", order, (1, 2, 3, 4))
    kept = s.derivatives
    if len(kept) >= order:
        del kept[0]
    order = min(index + 1, order)
    history = newest_first(kept, order - 1)
    step = steps_of(s, sample.device, lms_rows, order, len(history) + 1)[index]
    prev, *x0, derivative = step(sample, output, None, history, return_x0=return_x0, **guidance)
    kept.append(derivative)
    return prev, x0[0] if return_x0 else None


@dataclass
class LMSDiscreteScheduler(VarianceExploding):
    """step() takes the order, up to 4."""

    advance: ClassVar = lms_step

    def forget(self) -> None:
        self.derivatives: list[Tensor] = []

    def lay_out(self, steps: int | None) -> None:
        timesteps, sigmas = self.visit(steps)
        self.sigmas = torch.from_numpy(sigmas)
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32))

"""PNDM: pseudo Runge-Kutta steps, then linear multistep (Liu et al. 2022, arXiv:2202.09778)."""

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
from aigc_fast.schedulers.adams import EARLIER, adams, newest_first
from aigc_fast.schedulers.ancestral import alphas
from aigc_fast.schedulers.diffusion_scheduler import DiffusionScheduler
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
from aigc_fast.schedulers.tables import steps_of


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
    """Pseudo numerical methods (arXiv:2202.09778): Runge-Kutta, then linear multistep (PLMS).

    skip_prk_steps: begin with PLMS, without three Runge-Kutta steps (twelve calls of the model).
    """

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

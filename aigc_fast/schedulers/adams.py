"""Linear multistep methods: IPNDM and LMS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
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
)
from aigc_fast.schedulers.noise import Generator
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
    """The last `count` of these, or all there are."""
    return kept[: -count - 1 : -1]


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
    """Linear multistep (PLMS) of order up to 4, with alpha = cos and sigma = sin of
    timestep * pi / 2 unless trained_betas are given.
    """

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
    """Linear multistep in sigma.

    step() takes the order, 1 to 4, which is the default.
    """

    advance: ClassVar = lms_step

    def forget(self) -> None:
        self.derivatives: list[Tensor] = []

    def lay_out(self, steps: int | None) -> None:
        timesteps, sigmas = self.visit(steps)
        self.sigmas = torch.from_numpy(sigmas)
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32))

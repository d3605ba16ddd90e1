"""Multistep exponential integrators in the half log-SNR: DPM-Solver and DPM-Solver++ (Lu et al.
2022, arXiv:2206.00927 and 2211.01095), and DEIS (Zhang & Chen 2022, arXiv:2204.13902)."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers.ancestral import clipping
from aigc_fast.schedulers.euler import EDMScheduler
from aigc_fast.schedulers.linear import NOISE, SAMPLE, X0, Form, Mixed, Row, began, histories, named
from aigc_fast.schedulers.log_snr import (
    FinalSigma,
    LambdaScheduler,
    Levels,
    converted,
    epsilon_kept,
    is_edm,
    levels_of,
    without_variance,
)
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.scheduler import shift_in
from aigc_fast.schedulers.tables import steps_of

H1, H2 = named("h1"), named("h2")
HISTORY = ("h1", "h2", "h3")


# ---- the integrator -----------------------------------------------------------------------------


class Integral(NamedTuple):
    """x_t = sample * x + d0 * D0 + d1 * D1 + d2 * D2 + noise * z over a step of h in lambda; the
    midpoint rule takes half of d0 for d1."""

    sample: Tensor
    d0: Tensor
    d1: Tensor
    d2: Tensor
    noise: Tensor | None = None

    def begin(self, sample: Form, newest: Form) -> Form:
        """The terms of every order; those of order 1."""
        prev = self.sample * sample + self.d0 * newest
        return prev if self.noise is None else prev + self.noise * NOISE


def integral(algorithm: str, begin: Levels, end: Levels) -> Integral:
    """Of polynomials in lambda: for x0 (the algorithms with ++) times exp(lambda), or else for
    epsilon times exp(-lambda)."""
    h = end.lam - begin.lam
    in_x0, sde = algorithm.endswith("++"), algorithm.startswith("sde-")
    if in_x0:
        scale, decay, u = end.alpha, end.sigma / begin.sigma, -2.0 * h if sde else -h
    else:
        scale, decay, u = end.sigma, end.alpha / begin.alpha, h
    e = torch.exp(u) - 1.0
    half = -0.5 if sde else 0.5  # as in diffusers
    d0, d1, d2 = (-scale * weight for weight in (e, e / u - 1.0, (e - u) / u**2 - half))
    if not sde:
        return Integral(decay, d0, d1, d2)
    if in_x0:
        return Integral(decay * torch.exp(-h), d0, d1, d2, end.sigma * torch.sqrt(-e))
    noise = end.sigma * torch.sqrt(torch.exp(2 * h) - 1.0)
    return Integral(decay, 2.0 * d0, 2.0 * d1, torch.full_like(h, math.nan), noise)


def kept_of(s: Any, now: Levels) -> Form:
    """What the solver keeps of an output: x0 or epsilon."""
    return X0 if s.config.algorithm_type.endswith("++") else epsilon_kept(s, now)


def multistep(s: Any, levels: Levels, newest: Form, order: int) -> Form:
    """From `newest` and order - 1 earlier outputs."""
    end, now, one, two = (levels.at(k) for k in (1, 0, -1, -2))
    c = integral(s.config.algorithm_type, now, end)
    prev = c.begin(SAMPLE, newest)
    if order == 1:
        return prev
    if s.config.algorithm_type == "deis":
        return deis(levels, newest, order)
    h, h0 = end.lam - now.lam, now.lam - one.lam
    r0 = h0 / h
    first = (1.0 / r0) * (newest - H1)
    if order == 2:
        return prev + (0.5 * c.d0 if s.config.solver_type == "midpoint" else c.d1) * first
    r1 = (one.lam - two.lam) / h
    earlier = (1.0 / r1) * (H1 - H2)
    slope = first + (r0 / (r0 + r1)) * (first - earlier)
    return prev + c.d1 * slope + c.d2 * ((1.0 / (r0 + r1)) * (first - earlier))


def log(x: Tensor) -> Tensor:
    """By numpy, as in diffusers: torch's differs in the last bit, which the weights amplify."""
    return torch.from_numpy(np.log(x.numpy()))


def deis(levels: Levels, newest: Form, order: int) -> Form:
    """Orders 2 and 3 of section 4.2, with the polynomial in log rho."""
    end, now, one, two = (levels.at(k) for k in (1, 0, -1, -2))
    t, b, c1, c2 = (v.sigma / v.alpha for v in (end, now, one, two))
    if order == 2:

        def whole(t: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return t * (-log(c) + log(t) - 1) / (log(b) - log(c))

        weights = [whole(t, b, c1) - whole(b, b, c1), whole(t, c1, b) - whole(b, c1, b)]
    else:

        def cubic(t: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            u, v, w = log(t), log(c), log(d)
            top = t * (v * (w - u + 1) - w * u + w + u**2 - 2 * u + 2)
            return top / ((log(b) - v) * (log(b) - w))

        turns = ((b, c1, c2), (c1, c2, b), (c2, b, c1))
        weights = [cubic(t, *turn) - cubic(b, *turn) for turn in turns]
    total = SAMPLE / now.alpha
    for weight, form in zip(weights, (newest, H1, H2), strict=False):
        total += weight * form
    return end.alpha * total


# ---- the step -----------------------------------------------------------------------------------


def final_orders(s: Any, most: int) -> list[int]:
    """The order of each step where enough history is at hand: less at the end."""
    config, count = s.config, len(s.timesteps)
    orders = [most] * count
    few = config.lower_order_final and count < 15
    if few and count > 1:
        orders[-2] = min(most, 2)
    if (
        few
        or getattr(config, "euler_at_final", False)
        or getattr(config, "final_sigmas_type", None) == "zero"
    ):
        orders[-1] = 1
    return orders


def multistep_rows(s: Any, start: int) -> Mixed:
    """The rows of a loop that begins at step `start`."""
    levels = levels_of(s)
    now, most = levels.at(0), s.config.solver_order
    x0, kept = converted(s, now)[0], kept_of(s, now)
    finals = final_orders(s, most)
    orders = [
        min(order, 1 + history)
        for order, history in zip(finals, histories(len(finals), start, most), strict=True)
    ]
    rows = {
        order: Row(
            x0, multistep(s, levels, kept, order), None if kept is X0 else kept,
            HISTORY[: order - 1], **clipping(s),
        )
        for order in set(orders)
    }  # fmt: skip
    return Mixed(rows, orders)


def multistep_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, variance_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    output = without_variance(s, sample, output)
    kept = s.model_outputs
    start = began(index, s.lower_order_nums, len(kept))
    step = steps_of(s, sample.device, multistep_rows, start)[index]
    noise = None
    if step.stochastic:
        if variance_noise is None:
            noise = draw_noise(output, generator, None if is_edm(s) else torch.float32)
        else:
            noise = variance_noise.to(output)
    prev, x0, *second = step(sample, output, noise, kept[:0:-1], return_x0=True, **guidance)
    shift_in(kept, second[0] if second else x0)
    if s.lower_order_nums < len(kept):
        s.lower_order_nums += 1
    return prev, x0


# ---- the classes --------------------------------------------------------------------------------


def check_solver(s: Any, algorithms: tuple[str, ...], types: tuple[str, ...]) -> None:
    """As diffusers: what another class calls its algorithm or type becomes this one's first."""
    if s.algorithm_type not in algorithms and s.algorithm_type in ("deis", "dpmsolver",
                                                                   "dpmsolver++"):  # fmt: skip
        s.algorithm_type = algorithms[0]
    if s.solver_type not in types and s.solver_type in ("logrho", "bh1", "bh2", "midpoint",
                                                        "heun"):  # fmt: skip
        s.solver_type = types[0]
    for name, allowed in (("algorithm_type", algorithms), ("solver_type", types)):
        if getattr(s, name) not in allowed:
            raise NotImplementedError(
                f"{name} must be one of {', '.join(allowed)}, got {getattr(s, name)!r}"
            )
    check_choice("solver_order", s.solver_order, (1, 2, 3))
    if (
        s.algorithm_type in ("dpmsolver", "sde-dpmsolver")
        and getattr(s, "final_sigmas_type", None) == "zero"
    ):
        raise ValueError(f"final_sigmas_type must be sigma_min for {s.algorithm_type}, got 'zero'")
    if s.algorithm_type == "sde-dpmsolver" and s.solver_order == 3:
        raise ValueError("solver_order must be 1 or 2 for sde-dpmsolver, got 3")


@dataclass
class DPMSolverMultistepScheduler(FinalSigma):
    """DPM-Solver++ of order 1 to 3 ("2M"), its SDE variant, and DPM-Solver.

    algorithm_type:    dpmsolver++, sde-dpmsolver++, dpmsolver or sde-dpmsolver.
    solver_type:       midpoint or heun, for order 2.
    lower_order_final: lower orders in the last two steps, where there are fewer than 15.
    euler_at_final:    order 1 in the last step, however many there are.
    """

    _: KW_ONLY
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    lambda_min_clipped: float = -math.inf  # type: ignore[misc]
    variance_type: str | None = None
    rescale_betas_zero_snr: bool = False

    advance: ClassVar = multistep_step

    def __post_init__(self) -> None:
        algorithms = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
        check_solver(self, algorithms, ("midpoint", "heun"))
        self.rounds_karras = self.beta_schedule != "squaredcos_cap_v2"  # type: ignore[misc]
        super().__post_init__()


@dataclass
class DEISMultistepScheduler(LambdaScheduler):
    """DEIS of order 1 to 3, with the polynomial in log rho."""

    _: KW_ONLY
    solver_order: int = 2
    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    advance: ClassVar = multistep_step

    def __post_init__(self) -> None:
        check_solver(self, ("deis",), ("logrho",))
        super().__post_init__()


@dataclass
class EDMDPMSolverMultistepScheduler(EDMScheduler):
    """DPM-Solver++ for models preconditioned as by Karras et al."""

    _: KW_ONLY
    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    advance: ClassVar = multistep_step

    def __post_init__(self) -> None:
        check_solver(self, ("dpmsolver++", "sde-dpmsolver++"), ("midpoint", "heun"))
        super().__post_init__()

    def forget(self) -> None:
        self.model_outputs: list[Any] = [None] * self.solver_order
        self.lower_order_nums = 0

    def lay_out(self, steps: int | None) -> None:  # type: ignore[override]
        assert steps is not None
        self.finish(self.spread(torch.linspace(0, 1, steps)).float())
        if self.final_sigmas_type == "sigma_min":
            self.sigmas[-1] = self.sigma_min

"""DPM-Solver and DPM-Solver++ singlestep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095)."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor

from aigc_fast.schedulers.ancestral import clipping
from aigc_fast.schedulers.dpm_solver import H1, H2, check_solver, integral, kept_of
from aigc_fast.schedulers.linear import SAMPLE, X0, Row, named
from aigc_fast.schedulers.log_snr import FinalSigma, converted, levels_of, without_variance
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.scheduler import shift_in
from aigc_fast.schedulers.tables import steps_of


def singlestep_rows(s: Any, order: int) -> Row:
    """A step of this order begins order - 1 steps earlier, at the sample `first`."""
    levels = levels_of(s)
    end, now, one, two = (levels.at(k) for k in (1, 0, -1, -2))
    x0 = converted(s, now)[0]
    kept = kept_of(s, now)
    begin = (now, one, two)[order - 1]
    c = integral(s.config.algorithm_type, begin, end)
    midpoint = s.config.solver_type == "midpoint"
    base = SAMPLE if order == 1 else named("first")
    oldest = (kept, H1, H2)[order - 1]
    prev = c.begin(base, oldest)
    if order == 2:
        r0 = (now.lam - one.lam) / (end.lam - one.lam)
        slope = (1.0 / r0) * (kept - H1)
        prev += (0.5 * c.d0 if midpoint else c.d1) * slope
    elif order == 3:
        h = end.lam - two.lam
        r0, r1 = (now.lam - two.lam) / h, (one.lam - two.lam) / h
        early, late = (1.0 / r1) * (H1 - H2), (1.0 / r0) * (kept - H2)
        if midpoint:
            prev += c.d1 * late
        else:
            prev += c.d1 * ((r0 * early - r1 * late) / (r0 - r1))
            prev += c.d2 * (2.0 * (late - early) / (r0 - r1))
    history = ("first", "h1", "h2")
    return Row(x0, prev, None if kept is X0 else kept, history, **clipping(s))


def singlestep_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    output = without_variance(s, sample, output)
    kept = s.model_outputs
    order = s.order_list[index]
    while order > 1 and kept[1 - order] is None:
        order -= 1
    if order == 1:
        s.sample = sample
    step = steps_of(s, sample.device, singlestep_rows, order)[index]
    noise = draw_noise(output, generator) if step.stochastic else None
    history = (s.sample, *kept[:0:-1])
    prev, x0, *second = step(sample, output, noise, history, return_x0=True, **guidance)
    shift_in(kept, second[0] if second else x0)
    return prev, x0


@dataclass
class DPMSolverSinglestepScheduler(FinalSigma):
    """DPM-Solver++ with orders 1, 2, 3, 1, 2, 3, ...: every `solver_order` steps of the loop are
    one step of that order.
    """

    _: KW_ONLY
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = False
    lambda_min_clipped: float = -math.inf  # type: ignore[misc]
    variance_type: str | None = None

    timestep_spacing: ClassVar[str] = "linspace"  # type: ignore[misc]
    steps_offset: ClassVar[int] = 0  # type: ignore[misc]
    advance: ClassVar = singlestep_step

    def __post_init__(self) -> None:
        algorithms = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")
        check_solver(self, algorithms, ("midpoint", "heun"))
        super().__post_init__()

    def forget(self) -> None:
        super().forget()
        self.sample: Tensor | None = None

    def lay_out(self, steps: int | None, timesteps: Any = None, mu: float | None = None) -> None:
        super().lay_out(steps, timesteps, mu)
        count, order = len(self.timesteps), self.solver_order
        if count % order or self.final_sigmas_type == "zero":
            self.lower_order_final = True  # else the last steps would have no order
        cycle = list(range(1, order + 1))
        orders = cycle * (count // order) + cycle[: count % order]
        if self.lower_order_final and order == 3 and count % 3 == 0:
            orders = cycle * (count // 3 - 1) + [1, 2, 1]
        elif self.lower_order_final and order == 2 and count % 2 == 0:
            orders[-1] = 1
        if self.final_sigmas_type == "zero":
            orders[-1] = 1
        self.order_list = orders

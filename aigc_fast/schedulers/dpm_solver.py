"""Exponential integrators in the half log-SNR: DPM-Solver and DPM-Solver++ (Lu et al. 2022,
arXiv:2206.00927 and 2211.01095), multistep and singlestep, and DEIS (Zhang & Chen 2022,
arXiv:2204.13902)."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aigc_fast.schedulers.ancestral import clipping
from aigc_fast.schedulers.euler import EDMScheduler, denoised
from aigc_fast.schedulers.linear import (
    NOISE,
    OUTPUT,
    SAMPLE,
    X0,
    Form,
    Mixed,
    Row,
    named,
    predictions,
    steps_of,
)
from aigc_fast.schedulers.schedule import (
    one_of,
    shift_sigmas,
    sigma_to_timestep,
    space_timesteps,
)
from aigc_fast.schedulers.scheduler import Generator, SigmaScheduler, draw_noise

H1, H2 = named("h1"), named("h2")
HISTORY = ("h1", "h2", "h3")


class Levels(NamedTuple):
    """alpha, sigma and the half log-SNR at each of sigmas, the last one included."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    def at(self, shift: int) -> "Levels":
        """Of step i, those at i + shift. For shift < 0 the first steps have none."""
        count = len(self.sigma) - 1
        return Levels(*(torch.roll(v, -shift)[:count] for v in self))


def levels_of(s: Any) -> Levels:
    sigma = s.sigmas.cpu()
    if hasattr(s.config, "sigma_data"):
        alpha = torch.ones_like(sigma)
    elif getattr(s.config, "use_flow_sigmas", False):
        alpha = 1 - sigma
    else:
        alpha = 1 / (sigma**2 + 1) ** 0.5
        sigma = sigma * alpha
    return Levels(alpha, sigma, torch.log(alpha) - torch.log(sigma))


def converted(s: Any, now: Levels) -> tuple[Form, Form]:
    """x0 and epsilon of the model's output at the levels of the steps."""
    if hasattr(s.config, "sigma_data"):
        x0 = denoised(s, now.sigma)
        return x0, (SAMPLE - x0) / now.sigma
    kind = s.config.prediction_type
    if kind != "flow_prediction":
        return predictions(kind, now.alpha, now.sigma)
    x0 = SAMPLE - s.sigmas.cpu()[:-1] * OUTPUT
    return x0, (SAMPLE - now.alpha * x0) / now.sigma


def epsilon_kept(s: Any, now: Levels) -> Form:
    """epsilon, of the thresholded x0 where there is thresholding."""
    if getattr(s.config, "thresholding", False):
        return (SAMPLE - now.alpha * X0) / now.sigma
    return converted(s, now)[1]


# ---- the integrator -----------------------------------------------------------------------------


class Integral(NamedTuple):
    """x_t = sample * x + d0 * D0 + d1 * D1 + d2 * D2 + noise * z over a step of h in lambda; the
    midpoint rule takes half of d0 for d1."""

    sample: Tensor
    d0: Tensor
    d1: Tensor
    d2: Tensor
    noise: Tensor | None = None


def integral(algorithm: str, begin: Levels, end: Levels) -> Integral:
    h = end.lam - begin.lam
    alpha, sigma = end.alpha, end.sigma
    if algorithm == "dpmsolver++":
        e = torch.exp(-h) - 1.0
        return Integral(
            sigma / begin.sigma,
            -alpha * e,
            alpha * (e / h + 1.0),
            -alpha * ((e + h) / h**2 - 0.5),
        )
    if algorithm == "dpmsolver":
        e = torch.exp(h) - 1.0
        return Integral(
            alpha / begin.alpha,
            -sigma * e,
            -sigma * (e / h - 1.0),
            -sigma * ((e - h) / h**2 - 0.5),
        )
    if algorithm == "sde-dpmsolver++":
        e = 1 - torch.exp(-2.0 * h)
        return Integral(
            sigma / begin.sigma * torch.exp(-h),
            alpha * e,
            alpha * (e / (-2.0 * h) + 1.0),
            alpha * ((e - 2.0 * h) / (2.0 * h) ** 2 - 0.5),
            sigma * torch.sqrt(e),
        )
    e = torch.exp(h) - 1.0  # sde-dpmsolver
    return Integral(
        alpha / begin.alpha,
        -2.0 * (sigma * e),
        -2.0 * (sigma * (e / h - 1.0)),
        torch.full_like(h, math.nan),
        sigma * torch.sqrt(torch.exp(2 * h) - 1.0),
    )


def multistep(s: Any, levels: Levels, newest: Form, order: int) -> Form:
    """From `newest` and order - 1 earlier outputs."""
    end, now, one, two = (levels.at(k) for k in (1, 0, -1, -2))
    c = integral(s.config.algorithm_type, now, end)
    prev = c.sample * SAMPLE + c.d0 * newest
    if c.noise is not None:
        prev += c.noise * NOISE
    if order == 1:
        return prev
    h, h0 = end.lam - now.lam, now.lam - one.lam
    r0 = h0 / h
    first = (1.0 / r0) * (newest - H1)
    if order == 2:
        return prev + (0.5 * c.d0 if s.config.solver_type == "midpoint" else c.d1) * first
    r1 = (one.lam - two.lam) / h
    earlier = (1.0 / r1) * (H1 - H2)
    slope = first + (r0 / (r0 + r1)) * (first - earlier)
    return prev + c.d1 * slope + c.d2 * ((1.0 / (r0 + r1)) * (first - earlier))


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


def dpm_rows(s: Any, history: int) -> Mixed:
    """The rows where `history` earlier outputs are at hand."""
    levels = levels_of(s)
    now = levels.at(0)
    x0, _ = converted(s, now)
    epsilon = s.config.algorithm_type in ("dpmsolver", "sde-dpmsolver")
    kept = epsilon_kept(s, now) if epsilon else X0
    orders = final_orders(s, min(s.config.solver_order, history + 1))
    rows = {
        order: Row(
            x0, multistep(s, levels, kept, order), kept if epsilon else None,
            HISTORY[: order - 1], **clipping(s),
        )
        for order in set(orders)
    }  # fmt: skip
    return Mixed(rows, orders)


def log(x: Tensor) -> Tensor:
    """By numpy, as in diffusers: torch's differs in the last bit, which the weights amplify."""
    return torch.from_numpy(np.log(x.numpy()))


def deis(levels: Levels, newest: Form, order: int) -> Form:
    """Section 4.2 with the polynomial in log rho."""
    end, now, one, two = (levels.at(k) for k in (1, 0, -1, -2))
    if order == 1:
        c = integral("dpmsolver", now, end)
        return c.sample * SAMPLE + c.d0 * newest
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


def deis_rows(s: Any, history: int) -> Mixed:
    levels = levels_of(s)
    now = levels.at(0)
    kept = epsilon_kept(s, now)
    orders = final_orders(s, min(s.config.solver_order, history + 1))
    x0 = converted(s, now)[0]
    rows = {
        o: Row(x0, deis(levels, kept, o), kept, HISTORY[: o - 1], **clipping(s))
        for o in set(orders)
    }
    return Mixed(rows, orders)


def without_variance(s: Any, sample: Tensor, output: Tensor) -> Tensor:
    """The prediction alone, of a model that predicts a variance too: its first three channels."""
    if output.shape == sample.shape:
        return output
    learned = getattr(s.config, "variance_type", None) in ("learned", "learned_range")
    return output[:, :3] if learned else output


def multistep_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict, variance_noise: Tensor | None = None, *, rows: Any = dpm_rows,
    noise_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    output = without_variance(s, sample, output)
    kept = s.model_outputs
    step = steps_of(s, sample.device, rows, s.lower_order_nums)[index]
    noise = variance_noise
    if step.stochastic:
        if noise is None:
            noise = draw_noise(output, generator, noise_dtype)
        else:
            noise = noise.to(output)
    prev, x0, *second = step(sample, output, noise, kept[:0:-1], return_x0=True, **guidance)
    del kept[0]
    kept.append(second[0] if second else x0)
    if s.lower_order_nums < len(kept):
        s.lower_order_nums += 1
    return prev, x0


def edm_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return multistep_step(
        s, index, sample, output, generator, return_x0, guidance, noise_dtype=None
    )


def deis_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return multistep_step(s, index, sample, output, generator, return_x0, guidance, rows=deis_rows)


# ---- singlestep ---------------------------------------------------------------------------------


def singlestep_rows(s: Any, order: int) -> Row:
    """A step of this order begins order - 1 steps earlier, at the sample `first`."""
    levels = levels_of(s)
    end, now, one, two = (levels.at(k) for k in (1, 0, -1, -2))
    x0 = converted(s, now)[0]
    epsilon = s.config.algorithm_type == "dpmsolver"
    kept = epsilon_kept(s, now) if epsilon else X0
    begin = (now, one, two)[order - 1]
    c = integral(s.config.algorithm_type, begin, end)
    midpoint = s.config.solver_type == "midpoint"
    base = SAMPLE if order == 1 else named("first")
    oldest = (kept, H1, H2)[order - 1]
    prev = c.sample * base + c.d0 * oldest
    if c.noise is not None:
        prev += c.noise * NOISE
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
    return Row(x0, prev, kept if epsilon else None, history, **clipping(s))


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
    del kept[0]
    kept.append(second[0] if second else x0)
    return prev, x0


# ---- the classes --------------------------------------------------------------------------------


@dataclass
class LambdaScheduler(SigmaScheduler):
    """The schedules of the solvers in log-SNR, with thresholding and flow sigmas.

    lambda_min_clipped: leaves out timesteps with less log-SNR / 2; needed by squaredcos_cap_v2.
    use_flow_sigmas: sigma is the share of noise of flow matching, shifted by flow_shift.
    """

    _: KW_ONLY
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0

    predictions: ClassVar = ("epsilon", "sample", "v_prediction", "flow_prediction")
    lambda_min_clipped: ClassVar[float] = -math.inf
    rounds_karras: ClassVar[bool] = True

    @property
    def kept(self) -> int:
        """How many outputs the solver keeps."""
        return self.solver_order  # type: ignore[attr-defined]

    def forget(self) -> None:
        self.model_outputs: list[Any] = [None] * self.kept
        self.lower_order_nums = 0

    def last_timestep(self) -> int:
        alpha, sigma = super().training_levels()
        half_log_snr = torch.log(alpha) - torch.log(sigma)
        clipped = torch.searchsorted(half_log_snr.flip(0), self.lambda_min_clipped)
        return self.num_train_timesteps - int(clipped)

    def shift_of(self, mu: float | None) -> float:
        if mu is None:
            return self.flow_shift
        if not (self.use_dynamic_shifting and self.time_shift_type == "exponential"):  # type: ignore[attr-defined]
            raise AssertionError("mu is for use_dynamic_shifting with time_shift_type exponential")
        return math.exp(mu)

    def lay_out(self, steps: int | None, timesteps: Any = None, mu: float | None = None) -> None:
        train = self.train_sigmas()
        kind = self.spacing()
        lu = getattr(self, "use_lu_lambdas", False)
        if timesteps is not None:
            if kind or lu:
                raise ValueError(f"timesteps cannot be given with {kind or 'lu'} sigmas")
            timesteps = np.array(timesteps).astype(np.int64)
            steps = len(timesteps)
        else:
            timesteps = space_timesteps(
                self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset,
                last=self.last_timestep(), one_more=True,
            )  # fmt: skip
        assert steps is not None
        if kind or lu:
            if lu:
                ends = np.log(train)
                sigmas = np.exp(np.linspace(ends[-1].item(), ends[0].item(), steps))
            else:
                sigmas = self.respaced(train[::-1], steps)  # type: ignore[assignment]
            timesteps = sigma_to_timestep(sigmas, train)
            if (lu or kind == "karras") and self.rounds_karras:
                timesteps = timesteps.round()
        elif self.use_flow_sigmas:
            sigmas = self.flow_sigmas(steps, mu)
            timesteps = sigmas * self.num_train_timesteps
        else:
            sigmas = np.interp(timesteps, np.arange(len(train)), train)
        spaced = bool(kind or lu or self.use_flow_sigmas)
        values = np.append(sigmas, self.last_sigma(sigmas, spaced)).astype(np.float32)
        self.num_inference_steps = len(timesteps)
        self.sigmas = torch.from_numpy(values)
        self.timesteps = torch.from_numpy(timesteps.astype(np.int64))

    def flow_sigmas(self, steps: int, mu: float | None) -> np.ndarray:
        rising = 1.0 - np.linspace(1, 1 / self.num_train_timesteps, steps + 1)
        return shift_sigmas(rising, self.shift_of(mu))[:0:-1]

    def last_sigma(self, sigmas: np.ndarray, spaced: bool) -> float:
        """The sigma behind the last step."""
        return sigmas[-1] if spaced else self.train_sigmas()[0]


@dataclass
class FinalSigma(LambdaScheduler):
    """final_sigmas_type: zero, or sigma_min (the noise of timestep 0)."""

    _: KW_ONLY
    final_sigmas_type: str = "zero"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    def __post_init__(self) -> None:
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        super().__post_init__()

    def last_sigma(self, sigmas: np.ndarray, spaced: bool) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else self.train_sigmas()[0]


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
    one_of("solver_order", s.solver_order, (1, 2, 3))
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

    algorithm_type: dpmsolver++, sde-dpmsolver++, dpmsolver or sde-dpmsolver.
    solver_type:       midpoint or heun, for order 2.
    lower_order_final: lower orders in the last two steps of fewer than 15.
    euler_at_final:    order 1 in the last step of any number.
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
class DPMSolverSinglestepScheduler(FinalSigma):
    """DPM-Solver++ whose orders rise 1, 2, 3 and begin anew: every `solver_order` steps of the
    loop are one step of that order."""

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


@dataclass
class DEISMultistepScheduler(LambdaScheduler):
    """DEIS of order 1 to 3, with the polynomial in log rho."""

    _: KW_ONLY
    solver_order: int = 2
    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    advance: ClassVar = deis_step

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

    advance: ClassVar = edm_step

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

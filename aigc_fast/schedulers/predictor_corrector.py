"""Solvers that correct the sample of each step in the next one: UniPC (Zhao et al. 2023,
arXiv:2302.04867) and SA-Solver (Xue et al. 2023, arXiv:2305.14267).

The model's output at the predicted sample serves twice: it corrects that sample, and begins the
next step. Both are linear in the same tensors: one row with two results.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.schedulers.ancestral import clipping
from aigc_fast.schedulers.linear import NOISE, SAMPLE, X0, Form, Mixed, Row, named, steps_of
from aigc_fast.schedulers.log_snr import (
    FinalSigma,
    LambdaScheduler,
    Levels,
    converted,
    levels_of,
    without_variance,
)
from aigc_fast.schedulers.schedule import shift_sigmas
from aigc_fast.schedulers.scheduler import Generator, draw_noise, shift_in

EARLIER: tuple[str, ...] = ("h1", "h2", "h3")
LAST, LAST_NOISE = named("last"), named("last_noise")


def slot(s: Any, now: Levels) -> tuple[Form, dict[str, Any]]:
    """What the step keeps, x0 or epsilon, and how it is clipped."""
    x0, epsilon = converted(s, now)
    return (x0, clipping(s)) if s.predict_x0 else (epsilon, {})


def x0_of(s: Any, index: int, sample: Tensor, kept: Tensor) -> Tensor:
    """x0 of what the step keeps."""
    if s.predict_x0:
        return kept
    alpha, sigma = (v[index].item() for v in levels_of(s)[:2])
    return (sample - sigma * kept) / alpha


# ---- UniPC --------------------------------------------------------------------------------------


def unipc_update(
    s: Any, begin: Levels, end: Levels, past: Sequence[Levels], x: Form, newest: Form,
    earlier: Sequence[Form], at_end: Form | None,
) -> Form:  # fmt: skip
    """Algorithms 5 to 8, from begin to end; the corrector knows the output `at_end`."""
    order = 1 + len(past)
    h = end.lam - begin.lam
    hh = -h if s.predict_x0 else h
    phi_1 = torch.expm1(hh)
    scale = hh if s.config.solver_type == "bh1" else phi_1
    ratios = [(level.lam - begin.lam) / h for level in past] + [torch.ones_like(h)]
    phi_k, factorial, rights, powers = phi_1 / hh - 1, 1, [], []
    for i in range(1, order + 1):
        powers.append(torch.stack([ratio ** (i - 1) for ratio in ratios], 1))
        rights.append(phi_k * factorial / scale)
        factorial *= i + 1
        phi_k = phi_k / hh - 1 / factorial
    matrix, right = torch.stack(powers, 1), torch.stack(rights, 1)
    if at_end is None:  # the predictor
        matrix, right = matrix[:, :-1, :-1], right[:, :-1]
    if (at_end is None and order == 2) or (at_end is not None and order == 1):
        weights: Sequence[Any] = [0.5]
    elif order == 1:
        weights = []
    else:
        weights = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1).unbind(1)
    slopes = [(form - newest) / r for form, r in zip(earlier, ratios, strict=False)]
    if at_end is not None:
        slopes.append(at_end - newest)
    if s.predict_x0:
        result, outer = end.sigma / begin.sigma * x, end.alpha
    else:
        result, outer = end.alpha / begin.alpha * x, end.sigma
    result -= outer * phi_1 * newest
    for weight, slope in zip(weights, slopes, strict=True):
        result -= (outer * scale) * (weight * slope)
    return result


def unipc_rows(s: Any, corrector: int, history: int) -> Mixed:
    """The rows where the corrector has this order, 0 for none, and `history` outputs are kept."""
    levels = levels_of(s)
    now = levels.at(0)
    kept, clips = slot(s, now)
    outputs = [named(name) for name in EARLIER]
    x, corrected, names = SAMPLE, None, EARLIER
    if corrector:
        past = [levels.at(-1 - i) for i in range(1, corrector)]
        x = corrected = unipc_update(
            s, levels.at(-1), now, past, LAST, outputs[0], outputs[1:corrector], X0
        )
        names = ("last", *EARLIER)
    most, count = s.config.solver_order, len(s.timesteps)
    limits = range(count, 0, -1) if s.config.lower_order_final else [most] * count
    orders = [min(most, limit, history + 1) for limit in limits]
    rows = {}
    for order in set(orders):
        past = [levels.at(-i) for i in range(1, order)]
        prev = unipc_update(s, now, levels.at(1), past, x, X0, outputs[: order - 1], None)
        rows[order] = Row(kept, prev, corrected, names, **clips)
    return Mixed(rows, orders)


def unipc_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    outputs, history = s.model_outputs, s.lower_order_nums
    correct = index > 0 and s.last_sample is not None and index - 1 not in s.disable_corrector
    corrector = s.this_order if correct else 0
    step = steps_of(s, sample.device, unipc_rows, corrector, history)[index]
    tensors = (s.last_sample, *outputs[::-1]) if correct else outputs[::-1]
    prev, kept, *corrected = step(sample, output, None, tensors, return_x0=True, **guidance)
    s.last_sample = corrected[0] if correct else sample
    shift_in(outputs, kept)
    most = len(outputs)
    s.this_order = min(most, history + 1)
    left = len(s.timesteps) - index
    if left < s.this_order and s.config.lower_order_final:
        s.this_order = left
    if history < most:
        s.lower_order_nums = history + 1
    return prev, x0_of(s, index, sample, kept) if return_x0 else None


@dataclass
class UniPCMultistepScheduler(FinalSigma):
    """UniPC of order 1 to 3.

    predict_x0:        of B(h) in x0, not in epsilon.
    solver_type:       bh1 or bh2, the choice of B(h).
    disable_corrector: the steps after which the sample is not corrected.
    shift_terminal:    with use_flow_sigmas, the last sigma before the end.
    """

    _: KW_ONLY
    solver_order: int = 2
    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: list[int] = field(default_factory=list)
    solver_p: None = None
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    advance: ClassVar = unipc_step

    def __post_init__(self) -> None:
        if self.solver_type in ("midpoint", "heun", "logrho"):  # what others call theirs
            self.solver_type = "bh2"
        if self.solver_type not in ("bh1", "bh2"):
            raise NotImplementedError(f"solver_type must be bh1 or bh2, got {self.solver_type!r}")
        if self.solver_p is not None:
            raise NotImplementedError("solver_p is not supported, got one")
        if self.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {self.solver_order}")
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            raise ValueError("shift_terminal is for use_flow_sigmas")
        super().__post_init__()

    def forget(self) -> None:
        super().forget()
        self.last_sample: Tensor | None = None
        self.this_order = 0

    def lay_out(self, steps: int | None, sigmas: Any = None, mu: float | None = None) -> None:
        if self.use_dynamic_shifting and mu is None:
            raise ValueError("mu must be given to set_timesteps for use_dynamic_shifting")
        if sigmas is not None and not self.use_flow_sigmas:
            raise ValueError("sigmas can be given only with use_flow_sigmas")
        self._given = sigmas
        super().lay_out(len(sigmas) if sigmas is not None else steps, None, mu)
        if self.use_karras_sigmas and self.use_flow_sigmas:
            values = self.sigmas[:-1].double()
            values = values / (values + 1)
            self.timesteps = (values * self.num_train_timesteps).long()
            final = values[-1:] if self.final_sigmas_type == "sigma_min" else torch.zeros(1)
            self.sigmas = torch.cat([values, final]).float()

    def flow_sigmas(self, steps: int, mu: float | None) -> np.ndarray:
        if self._given is not None:
            sigmas = np.array(self._given)
        else:
            sigmas = np.linspace(1, 1 / self.num_train_timesteps, steps + 1)[:-1]
        if self.use_dynamic_shifting:
            assert mu is not None
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigmas = factor / (factor + (1 / sigmas - 1) ** 1.0)
        else:
            sigmas = shift_sigmas(sigmas, self.flow_shift)
        if self.shift_terminal:
            signal = 1 - sigmas
            sigmas = 1 - signal / (signal[-1] / (1 - self.shift_terminal))
        if abs(sigmas[0] - 1) < 1e-6:  # the log-SNR must be finite
            sigmas[0] -= 1e-6
        return sigmas

    def last_sigma(self, sigmas: np.ndarray, spaced: bool) -> float:
        if self.final_sigmas_type == "sigma_min" and spaced:
            return sigmas[-1]
        return super().last_sigma(sigmas, spaced)


# ---- SA-Solver ----------------------------------------------------------------------------------


def lagrange(points: Sequence[Tensor]) -> list[list[Any]]:
    """Of each point's Lagrange polynomial, the coefficients, the highest power first."""
    result = []
    for i, point in enumerate(points):
        others = [p for j, p in enumerate(points) if j != i]
        below: Any = 1.0
        for other in others:
            below = (point - other) * below
        tops: list[Any] = [1.0]
        for other in others:
            tops = [*tops, 0.0]
            tops = [a - other * b for a, b in zip(tops, [0.0, *tops[:-1]], strict=True)]
        result.append([top / below for top in tops])
    return result


#: Of the integral of x^k exp(x): the polynomial beside exp(x), the highest power first
PARTS = ((1.0,), (1.0, -1.0), (1.0, -2.0, 2.0), (1.0, -3.0, 6.0, -6.0))


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    powers = range(len(coefficients) - 1, -1, -1)
    terms = [c * x**k for c, k in zip(coefficients, powers, strict=True)]
    return sum(terms[1:], terms[0])


def sa_integral(k: int, begin: Tensor, end: Tensor, tau: Tensor, predict_x0: bool) -> Tensor:
    """Of lambda^k exp((1 + tau^2) lambda), or of lambda^k exp(-lambda)."""
    if predict_x0:
        c = 1 + tau**2
        a, b = c * begin, c * end
        inner = polynomial(PARTS[k], b) - polynomial(PARTS[k], a) * torch.exp(-(b - a))
        return torch.exp(b) * inner / c ** (k + 1)
    signs = [abs(p) for p in PARTS[k]]
    inner = polynomial(signs, begin) * torch.exp(end - begin) - polynomial(signs, end)
    return torch.exp(-end) * inner


def sa_update(
    s: Any, begin: Levels, end: Levels, points: Sequence[Tensor], outputs: Sequence[Form],
    tau: Tensor, x: Form, noise: Form, corrector: bool,
) -> Form:  # fmt: skip
    """Equations 14 and 17: Adams steps with the outputs at `points`, and noise by tau."""
    order = len(points)
    h, c = end.lam - begin.lam, 1 + tau**2
    weights = []
    for row in lagrange(points):
        total: Any = 0
        for j, scale in enumerate(row):
            part = sa_integral(order - 1 - j, begin.lam, end.lam, tau, s.predict_x0)
            total = total + scale * part
        weights.append(total)
    if s.predict_x0 and order == 2:  # section 4.3: exact for linear coefficients
        part = h * c - 1 + torch.exp(c * -h)
        if corrector:
            extra = torch.exp(c * end.lam) * (h / 2 - part / (c**2 * h))
        else:
            extra = torch.exp(c * end.lam) * (h**2 / 2 - part / c**2) / (points[0] - points[1])
        weights = [weights[0] + extra, weights[1] - extra]
    if s.predict_x0:
        outer = c * end.sigma * torch.exp(-(tau**2) * end.lam)
        result = torch.exp(-(tau**2) * h) * (end.sigma / begin.sigma) * x
        result += end.sigma * torch.sqrt(1 - torch.exp(-2 * tau**2 * h)) * noise
    else:
        outer = -c * end.alpha
        result = end.alpha / begin.alpha * x
        result += tau * end.sigma * torch.sqrt(torch.exp(2 * h) - 1) * noise
    for weight, form in zip(weights, outputs, strict=True):
        result += (outer * weight) * form
    return result


def sa_orders(s: Any, index: int, history: int) -> tuple[int, int]:
    """The order of the predictor of this step, and of the corrector of the next."""
    config, left = s.config, len(s.timesteps) - index
    if not config.lower_order_final:
        left = 99
    return (
        min(config.predictor_order, left, history + 1),
        min(config.corrector_order, left + 1, history + 2),
    )


def sa_rows(s: Any, corrector: int, history: int) -> Mixed:
    levels = levels_of(s)
    now, before = levels.at(0), levels.at(-1)
    kept, clips = slot(s, now)
    outputs = [X0, *(named(name) for name in EARLIER)]
    tau = torch.tensor([float(s.tau_func(t)) for t in s.timesteps.cpu()])
    x, corrected, names = SAMPLE, None, EARLIER
    if corrector:
        points = [levels.at(-i).lam for i in range(corrector)]
        x = corrected = sa_update(
            s, before, now, points, outputs[:corrector], tau.roll(1), LAST, LAST_NOISE, True
        )
        names = ("last", "last_noise", *EARLIER)
    orders = [sa_orders(s, i, history)[0] for i in range(len(s.timesteps))]
    rows = {}
    for order in set(orders):
        points = [levels.at(-i).lam for i in range(order)]
        prev = sa_update(s, now, levels.at(1), points, outputs[:order], tau, x, NOISE, False)
        rows[order] = Row(kept, prev, corrected, names, **clips)
    return Mixed(rows, orders)


def sa_step(
    s: Any, index: int, sample: Tensor, output: Tensor, generator: Generator, return_x0: bool,
    guidance: dict,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    output = without_variance(s, sample, output)
    outputs, history = s.model_outputs, s.lower_order_nums
    correct = index > 0 and s.last_sample is not None
    corrector = s.this_corrector_order if correct else 0
    step = steps_of(s, sample.device, sa_rows, corrector, history)[index]
    tensors = outputs[::-1]
    if correct:
        tensors = [s.last_sample, s.last_noise, *tensors]
    noise = draw_noise(output, generator)
    prev, kept, *corrected = step(sample, output, noise, tensors, return_x0=True, **guidance)
    s.last_sample, s.last_noise = (corrected[0] if correct else sample), noise
    shift_in(outputs, kept)
    s.this_predictor_order, s.this_corrector_order = sa_orders(s, index, history)
    if history < len(outputs):
        s.lower_order_nums = history + 1
    return prev, x0_of(s, index, sample, kept) if return_x0 else None


def middle(timestep: float | Tensor) -> int:
    """The default tau: noise in the middle of the schedule."""
    return 1 if 200 <= timestep <= 800 else 0


@dataclass
class SASolverScheduler(LambdaScheduler):
    """Stochastic Adams methods of predictor and corrector orders 1 to 4.

    tau_func: timestep -> the strength of the noise; by default 1 from 200 to 800.
    algorithm_type: data_prediction or noise_prediction.
    """

    _: KW_ONLY
    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: Callable[[Any], float] | None = None
    algorithm_type: str = "data_prediction"
    lambda_min_clipped: float = -math.inf  # type: ignore[misc]
    variance_type: str | None = None

    advance: ClassVar = sa_step

    def __post_init__(self) -> None:
        if self.algorithm_type not in ("data_prediction", "noise_prediction"):
            raise NotImplementedError(
                "algorithm_type must be data_prediction or noise_prediction, "
                f"got {self.algorithm_type!r}"
            )
        for name in ("predictor_order", "corrector_order"):
            if getattr(self, name) not in (1, 2, 3, 4):
                raise ValueError(f"{name} must be 1, 2, 3 or 4, got {getattr(self, name)}")
        self.predict_x0 = self.algorithm_type == "data_prediction"
        if self.tau_func is None:
            self.tau_func = middle
        super().__post_init__()

    @property
    def kept(self) -> int:
        return max(self.predictor_order, self.corrector_order - 1)

    def forget(self) -> None:
        super().forget()
        self.last_sample: Tensor | None = None
        self.last_noise: Tensor | None = None
        self.this_corrector_order = 0

    def to_dict(self) -> dict[str, Any]:
        """Without tau_func, which is no data."""
        return {**super().to_dict(), "tau_func": None}

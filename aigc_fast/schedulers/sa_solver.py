"""SA-Solver (Xue et al. 2023, arXiv:2305.14267): stochastic, and corrects as UniPC does."""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aigc_fast.schedulers.linear import NOISE, SAMPLE, X0, Form, Mixed, Row, named
from aigc_fast.schedulers.log_snr import LambdaScheduler, Levels, levels_of, without_variance
from aigc_fast.schedulers.noise import Generator, draw_noise
from aigc_fast.schedulers.scheduler import shift_in
from aigc_fast.schedulers.tables import steps_of
from aigc_fast.schedulers.unipc import EARLIER, LAST, slot, x0_of

LAST_NOISE = named("last_noise")


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
    """At x; the coefficient of the highest power comes first."""
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
    """Stochastic Adams methods, with predictor and corrector of orders 1 to 4.

    tau_func: timestep -> strength of the noise; by default 1 for timesteps 200 to 800, else 0.
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

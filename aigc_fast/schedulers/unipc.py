"""UniPC (Zhao et al. 2023, arXiv:2302.04867), which corrects the sample of each step in the next.

The model's output at the predicted sample serves twice: it corrects that sample, and begins the
next step. Both are linear in the same tensors: one row with two results.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.schedulers.ancestral import clipping
from aigc_fast.schedulers.linear import SAMPLE, X0, Form, Mixed, Row, named
from aigc_fast.schedulers.log_snr import FinalSigma, Levels, converted, levels_of
from aigc_fast.schedulers.noise import Generator
from aigc_fast.schedulers.schedule import shift_sigmas
from aigc_fast.schedulers.scheduler import is_as_returned, shift_in
from aigc_fast.schedulers.tables import steps_of

EARLIER: tuple[str, ...] = ("h1", "h2", "h3")
LAST = named("last")


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


def unipc_rows(s: Any, corrector: int, history: int, at_prev: bool = False) -> Mixed:
    """The rows where the corrector has this order, 0 for none, and `history` outputs are kept;
    `at_prev` if the sample is what the predictor returned, to which the corrector adds a
    difference."""
    levels = levels_of(s)
    now = levels.at(0)
    kept, clips = slot(s, now)
    outputs = [named(name) for name in EARLIER]
    x, corrected, names = SAMPLE, None, EARLIER
    if corrector:
        past = [levels.at(-1 - i) for i in range(1, corrector)]
        at = (s, levels.at(-1), now, past, LAST, outputs[0], outputs[1:corrector])
        x = corrected = unipc_update(*at, X0)
        if at_prev:  # which leaves nothing of the last sample
            x = corrected = SAMPLE + (corrected - unipc_update(*at, None))
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
    at_prev = correct and is_as_returned(sample, s.__dict__.get("_aigc_fast_returned"))
    step = steps_of(s, sample.device, unipc_rows, corrector, history, at_prev)[index]
    tensors = (s.last_sample, *outputs[::-1]) if correct else outputs[::-1]
    prev, kept, *corrected = step(sample, output, None, tensors, return_x0=True, **guidance)
    s.last_sample = corrected[0] if correct else sample
    s._aigc_fast_returned = prev
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

    predict_x0:        whether the solver works on predictions of x0, or of epsilon.
    solver_type:       bh1 or bh2, the choice of B(h).
    disable_corrector: indices of the steps after which the sample is not corrected.
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

    counts_lists: ClassVar = True
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
        self._given = sigmas, mu
        super().lay_out(len(sigmas) if sigmas is not None else steps)
        if self.use_karras_sigmas and self.use_flow_sigmas:
            values = self.sigmas[:-1].double()
            values = values / (values + 1)
            self.timesteps = (values * self.num_train_timesteps).long()
            final = values[-1:] if self.final_sigmas_type == "sigma_min" else torch.zeros(1)
            self.sigmas = torch.cat([values, final]).float()

    def flow_sigmas(self, steps: int, shift: float) -> np.ndarray:
        given, mu = self._given
        if given is not None:
            sigmas = np.array(given)
        else:
            sigmas = np.linspace(1, 1 / self.num_train_timesteps, steps + 1)[:-1]
        if self.use_dynamic_shifting:
            assert mu is not None
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigmas = factor / (factor + (1 / sigmas - 1) ** 1.0)
        else:
            sigmas = shift_sigmas(sigmas, shift)
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

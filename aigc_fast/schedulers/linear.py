"""Solvers as linear algebra: what a step computes, and the rows of ops.scheduler_step it makes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.ops.scheduler_step import (
    _scheduler_step,
    _scheduler_step_both,
    _scheduler_step_full,
)

Scalar = float | Tensor


class Form:
    """A linear combination of tensors that a step reads, by name.

    A coefficient is a number or a tensor (steps,) with one for each step. Formulas of the papers
    are written with these, and the rows fall out. The scalars of a formula are fp32 tensors, in
    diffusers' order of operations, with IEEE's inf and NaN; what multiplies a form is a float64
    from there, so that a row is rounded once. These are numpy's: on a few numbers torch's own
    take three times as long.
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None  # a numpy scalar on the left leaves the arithmetic to this class

    def __init__(self, terms: dict[str, Any]) -> None:
        self.terms = terms

    def __add__(self, other: "Form") -> "Form":
        terms = dict(self.terms)
        for name, scale in other.terms.items():
            terms[name] = terms[name] + scale if name in terms else scale
        return Form(terms)

    def __sub__(self, other: "Form") -> "Form":
        return self + -other

    def __neg__(self) -> "Form":
        return Form({name: -scale for name, scale in self.terms.items()})

    def __mul__(self, factor: Scalar) -> "Form":
        factor = as_double(factor)
        return Form({name: factor * scale for name, scale in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "Form":
        divisor = as_double(divisor)
        return Form({name: scale / divisor for name, scale in self.terms.items()})


def as_double(scalar: Scalar) -> Any:
    """A tensor of scalars as a float64 array; numbers as they are."""
    return scalar.double().numpy() if isinstance(scalar, Tensor) else scalar


def named(name: str) -> Form:
    """The tensor of that name alone."""
    return Form({name: 1.0})


#: What every step has: the sample, the model's output, x0 after clipping, noise.
SAMPLE, OUTPUT, X0, NOISE = map(named, ("sample", "output", "x0", "noise"))


def predictions(kind: str, alpha: Scalar, sigma: Scalar) -> tuple[Form, Form]:
    """x0 and epsilon from (sample, output), where sample = alpha * x0 + sigma * epsilon."""
    if kind == "epsilon":
        return (SAMPLE - sigma * OUTPUT) / alpha, OUTPUT
    if kind == "sample":
        return OUTPUT, (SAMPLE - alpha * OUTPUT) / sigma
    if kind == "v_prediction":
        return alpha * SAMPLE - sigma * OUTPUT, alpha * OUTPUT + sigma * SAMPLE
    if kind == "flow_prediction":
        x0 = SAMPLE - sigma * OUTPUT
        return x0, (SAMPLE - alpha * x0) / sigma
    raise ValueError(
        f"prediction_type must be epsilon, sample, v_prediction or flow_prediction, got {kind!r}"
    )


class Threshold(NamedTuple):
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): x0 is clipped to
    this quantile of its own size, which is held between 1 and `most` (`most` wins), and divided
    by it."""

    quantile: float
    most: float

    def rows(self, row: Tensor, sample: Tensor, output: Tensor, guidance: dict) -> Tensor:
        """(batch, columns): `row` for each sample, with its own threshold."""
        plain = torch.zeros(7, dtype=row.dtype, device=row.device)
        plain[:2] = row[:2]
        # An assignment of a number would make a tensor on the host.
        plain[2].fill_(math.inf)
        plain[3].fill_(1.0)
        x0: Any = ops.scheduler_step(sample, output, plain, **guidance)
        size = x0.flatten(1).abs().to(row.dtype)
        threshold = torch.quantile(size, self.quantile, dim=1).clamp(min=1, max=self.most)
        rows = row.repeat(len(sample), 1)
        rows[:, :2] /= threshold[:, None]
        rows[:, 2].fill_(1.0)
        return rows


class Step(NamedTuple):
    """A row of ops.scheduler_step, and which tensors it reads."""

    row: Tensor
    noisy: bool
    reads: tuple[int, ...]
    threshold: Threshold | None = None
    stochastic: bool = False  # the solver draws noise here, read or not
    has_second: bool = False

    def __call__(
        self,
        sample: Tensor,
        output: Tensor,
        noise: Tensor | None = None,
        history: Sequence[Tensor] = (),
        *,
        return_x0: bool = False,
        **guidance: Any,
    ) -> Any:
        row = self.row
        if not self.noisy:
            noise = None
        if len(self.reads) != len(history):
            history = [history[i] for i in self.reads]
        if self.threshold is not None:
            row = self.threshold.rows(row, sample, output, guidance)
        elif not guidance and not torch.is_grad_enabled():
            # The operators themselves: the public function's questions cost a fifth of a small
            # step.
            if return_x0 and not self.has_second:
                return _scheduler_step_both(sample, output, row, history, noise)
            if not history and not self.has_second:
                return _scheduler_step(sample, output, row, noise)
            results = _scheduler_step_full(
                sample, output, row, history, noise, None, 1.0, 0.0, return_x0
            )
            return tuple(results) if self.has_second else results[0]
        return ops.scheduler_step(
            sample, output, row, noise=noise, history=history, return_x0=return_x0, **guidance
        )


class Row(NamedTuple):
    """The rows of all steps, written as forms; `history` names what a step may read beside its
    own tensors, in the order in which the solver hands it over."""

    x0: Form
    prev: Form
    second: Form | None = None
    history: tuple[str, ...] = ()
    clip: Scalar = math.inf
    threshold: Threshold | None = None

    def table(self, count: int) -> np.ndarray:
        """(count, columns) fp32"""
        names = ("x0", "sample", "output", "noise", *self.history)
        columns = [self.x0.terms.get(name, 0.0) for name in ("sample", "output")] + [self.clip]
        results = [self.prev] if self.second is None else [self.prev, self.second]
        for form in results:
            assert not set(form.terms) - set(names), form.terms
            columns += [form.terms.get(name, 0.0) for name in names]
        table = np.empty((count, len(columns)), np.float32)
        for k, column in enumerate(columns):
            table[:, k] = column[:count] if np.ndim(column) else column
        return table

    def steps(self, count: int, device: torch.device | str | None) -> list[Step]:
        """One Step each; history and noise that have the coefficient 0 are not read."""
        return self.steps_at(range(count), count, device)

    def steps_at(
        self, places: Sequence[int], count: int, device: torch.device | str | None
    ) -> list[Step]:
        """The steps at `places` of `count`."""
        table = self.table(count)
        optional = 1 + len(self.history)
        firsts = [6] if self.second is None else [6, 9 + optional]
        used = (table[:, firsts[0] : firsts[0] + optional] != 0) | (
            table[:, firsts[-1] : firsts[-1] + optional] != 0
        )
        patterns = [tuple(used[i].tolist()) for i in places]
        rows: dict[tuple, tuple[Tensor, ...]] = {}
        for pattern in set(patterns):
            kept = [
                c
                for c in range(table.shape[1])
                if not any(f <= c < f + optional and c != f and not pattern[c - f] for f in firsts)
            ]
            rows[pattern] = torch.from_numpy(table.take(kept, axis=1)).to(device).unbind()
        return [
            Step(
                rows[p][i],
                p[0],
                tuple(k for k, read in enumerate(p[1:]) if read),
                self.threshold,
                "noise" in self.prev.terms,
                self.second is not None,
            )
            for i, p in zip(places, patterns, strict=True)
        ]


class Mixed(NamedTuple):
    """Steps of several orders: step i is that of rows[orders[i]]."""

    rows: dict[int, Row]
    orders: list[int]

    def steps(self, count: int, device: torch.device | str | None) -> list[Step]:
        steps: dict[int, Step] = {}
        for order, row in self.rows.items():
            places = [i for i, at in enumerate(self.orders) if at == order]
            steps.update(zip(places, row.steps_at(places, count, device), strict=True))
        return [steps[i] for i in range(count)]


# ---- how much history a step has ----------------------------------------------------------------


def began(index: int, history: int, most: int) -> int:
    """Where the loop began in which step `index` has so much history, of `most` that count: the
    rows of one loop are made together. With all history it does not matter."""
    return index - history if history < most else min(index - most, 0)


def histories(count: int, start: int, most: int) -> list[int]:
    """How much history each step has in a loop that began at `start`."""
    return [min(max(index - start, 0), most) for index in range(count)]

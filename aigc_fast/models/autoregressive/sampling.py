"""How the next token of each sequence of a batch is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.ops.sampling import LIMITS, check_settings

from .arguments import check_fields


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `ops.sample_tokens` for the numbers.

    Attributes:
        temperature: 0 takes the most likely token.
        repetition_penalty: also on the tokens of the prompt; the other two only on new ones.
        seed: the same seed gives the same tokens, whatever else is in the batch; None draws one
            from torch's generator. `generate` adds the number of the prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Here and not in the step of a batch, where one request's mistake would end all.
        check_fields(self)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in int64, got {self.seed}")
        check_settings([float(getattr(self, name)) for name in LIMITS])

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


GREEDY = Sampling()
_PARAMETERS = [field.name for field in fields(Sampling) if field.name != "seed"]


class Choice:
    """The sampling of one sequence as it goes on.

    Attributes:
        step: how many tokens it has drawn.
        counts: int32 (vocab_size,), the `token_counts` of `ops.sample_tokens`; None without
            penalties.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self.sampling, self.step = sampling, 0
        seed = sampling.seed
        self.seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
        self.counts: Tensor | None = None
        if sampling.has_penalties:
            self.counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)
            self.counts[list(prompt)] = -1  # what only the prompt has


class BatchSampler:
    """Draws the tokens of a batch, and counts them where there are penalties."""

    def __init__(self, choices: Sequence[Choice], device: torch.device) -> None:
        self._choices = choices
        self._seeds = torch.tensor([choice.seed for choice in choices], device=device)
        first = choices[0].sampling
        self._parameters: dict[str, Any] = {
            name: getattr(first, name)
            if all(getattr(choice.sampling, name) == getattr(first, name) for choice in choices)
            else torch.tensor(
                [float(getattr(choice.sampling, name)) for choice in choices], device=device
            )
            for name in _PARAMETERS
        }
        self._counts: Tensor | None = None
        counted = [choice.counts for choice in choices if choice.counts is not None]
        if counted:
            none = torch.zeros_like(counted[0])
            self._counts = torch.stack(
                [none if choice.counts is None else choice.counts for choice in choices]
            )
            for choice, row in zip(choices, self._counts, strict=True):
                if choice.counts is not None:
                    choice.counts = row

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities, int64 and float32 (rows,).

        Args:
            logits: (rows, vocab_size).
            rows: the sequence of each row, in order. A second row of one sequence is drawn as its
                next token.
        """
        steps = torch.tensor(self.steps(rows), device=logits.device)
        return ops.sample_tokens(logits, steps=steps, **self.arguments(rows))

    def steps(self, rows: Sequence[int]) -> list[int]:
        """Of `ops.sample_tokens`, for these rows."""
        steps = [self._choices[row].step for row in rows]
        for i in range(1, len(rows)):
            if rows[i] == rows[i - 1]:
                steps[i] = steps[i - 1] + 1
        return steps

    def arguments(self, rows: Sequence[int]) -> dict[str, Any]:
        """The others of `ops.sample_tokens` for these rows, always in the same order."""
        found = {"token_counts": self._counts, "seeds": self._seeds, **self._parameters}
        if len(rows) == len(self._choices):
            return found
        at = torch.tensor(rows, device=self._seeds.device)
        return {
            name: value[at] if isinstance(value, Tensor) else value for name, value in found.items()
        }

    def count(self, row: int, token: int) -> None:
        """Counts a token that a sequence has taken."""
        choice = self._choices[row]
        choice.step += 1
        if choice.counts is not None:
            choice.counts[token] = choice.counts[token].clamp(min=0) + 1

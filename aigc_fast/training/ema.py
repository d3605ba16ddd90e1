"""Exponential moving average of a model's weights."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class EMA:
    """A moving average of a model's weights and buffers, in the attribute `model`.

    decay: share of the old average that stays at every update, in [0, 1). At first it is less,
        (1 + updates) / (10 + updates), so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0
        self._of: dict[Tensor, Tensor] = dict(
            zip(model.parameters(), self.model.parameters(), strict=True)
        )

    def averages_of(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """The average of each of these parameters.

        Raises ValueError for one that the model did not have when this average was made.
        """
        parameters = list(parameters)
        if not all(p in self._of for p in parameters):
            raise ValueError("average must be an EMA of the model that has the parameters")
        return {p: self._of[p] for p in parameters}

    def next_decay(self) -> float:
        """The share that stays at the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights and buffers of `model`."""
        torch._foreach_lerp_(
            list(self.model.parameters()),
            [p.detach() for p in model.parameters()],
            1 - self.next_decay(),
        )
        self.update_buffers(model)
        self.updates += 1

    @torch.no_grad()
    def update_buffers(self, model: nn.Module, decay: Tensor | None = None) -> None:
        """Moves the buffers alone, by the same share: statistics that a batch norm keeps are those
        of the weights it had. What is no floating number is copied.

        decay: a scalar tensor in place of `next_decay()`.
        """
        share = 1 - (self.next_decay() if decay is None else decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            if buffer.is_floating_point():
                average.lerp_(buffer, share.to(buffer) if isinstance(share, Tensor) else share)
            else:
                average.copy_(buffer)

"""torch's Adam and AdamW, every tensor in one call of the compiled kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aigc_fast import ops

from .ema import EMA


class Adam(torch.optim.Adam):
    """torch.optim.Adam with gradient clipping, averaged weights and a guard in the same step.

    params, lr, betas, eps, weight_decay, decoupled_weight_decay: as there. State dicts are those of
        torch.optim.Adam and AdamW, and load in either direction.
    max_norm: all gradients together are scaled down to this norm, as
        torch.nn.utils.clip_grad_norm_ does.
    average:  an EMA of the model whose parameters these are; its weights move in the same pass, its
        buffers do not. Its state is its own, not of this state dict.
    guard:    a step whose loss or gradients are not finite changes nothing and is counted in
        `skipped`, a tensor. Costs a further pass over the gradients where there is no max_norm.

    Raises ValueError for amsgrad and maximize, in a loaded state dict too, and for an average of
    another model; TypeError for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        average: EMA | None = None,
        guard: bool = True,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled_weight_decay
        )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        self.max_norm, self.average, self.guard = max_norm, average, guard
        everything = [p for group in self.param_groups for p in group["params"]]
        self._averages = {} if average is None else average.averages_of(everything)
        self.skipped = torch.zeros((), device=everything[0].device)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Tensor | None = None,
        rates: Tensor | None = None,
    ) -> Any:
        """One step; returns what `closure` returns.

        loss: a scalar tensor; where it is not finite the step is skipped.
        rates: for a step within a CUDA graph: a tensor (2,) on the device that is read in place of
            the learning rate of every group and the decay of `average`, whose updates are then for
            the caller to count.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        norm = None
        if self.guard or self.max_norm is not None:
            norm = _norm([p for group in self.param_groups for p in group["params"]], loss)
        ema_decay = 0.0 if self.average is None else self.average.next_decay()
        counter: Tensor | None = self.skipped
        for group in self.param_groups:
            for params in _by_dtype([p for p in group["params"] if p.grad is not None]):
                states = [self._state_of(p) for p in params]
                ops.adam_step(
                    params,
                    [p.grad for p in params],  # type: ignore[misc]
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [state["step"] for state in states],
                    [self._averages[p] for p in params] if self._averages else (),
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decoupled=group["decoupled_weight_decay"],
                    ema_decay=ema_decay,
                    norm=norm,
                    max_norm=self.max_norm,
                    skipped=counter,
                    rates=rates,
                )
                counter = None  # a step is counted once
        if self.average is not None and rates is None:
            self.average.updates += 1
        return result

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        elif state["step"].device != param.device:  # torch may keep it on the CPU
            state["step"] = state["step"].to(param.device)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"{option} must be False: this optimizer does not have it")
        super().__setstate__(state)


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each dtype: a call of an operator takes those of one."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _norm(params: list[Tensor], loss: Tensor | None) -> Tensor | None:
    """Of all gradients together; None where there are none."""
    grads = _by_dtype([p.grad for p in params if p.grad is not None])
    norms = [ops.gradient_norm(some, loss) for some in grads]
    if len(norms) < 2:
        return norms[0] if norms else None
    return torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms])).float()


class AdamW(Adam):
    """`Adam` with decoupled weight decay, as torch.optim.AdamW."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        average: EMA | None = None,
        guard: bool = True,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay=True,
            max_norm=max_norm, average=average, guard=guard,
        )  # fmt: skip

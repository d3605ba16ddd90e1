"""What schedulers make of their schedules, made once for all that have the same."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from aigc_fast.schedulers.linear import Step


@contextmanager
def plainly() -> Iterator[None]:
    """As schedules are made, or a function that makes one. On the CPU, whatever the default device
    is. Tensors of inference_mode would not count their changes, nor could they be used again where
    gradients are wanted."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


class Tables:
    """What a scheduler has made of its schedule, for as long as that stays the same."""

    __slots__ = (
        "config", "count", "frozen_config", "index_of", "made", "numbers", "pointer", "read",
        "shared", "size", "span", "timesteps",
    )  # fmt: skip

    def __init__(self, scheduler: Any, before: "Tables | None") -> None:
        state = scheduler.__dict__
        self.read, self.count = tensors_read(state), state.get("num_inference_steps")
        self.config = state.get("_internal_dict")
        if before is not None and self.config is not None and self.config is before.config:
            self.frozen_config: Any = before.frozen_config
        else:
            self.frozen_config = frozen(configuration(scheduler))
        found = made_for(scheduler, self.frozen_config)
        self.made: dict[Any, Any] = {} if found is None else found
        self.shared = found is not None
        self.index_of: dict[float, int] | None = None
        self.numbers: list[float] | None = None
        self.timesteps = timesteps = scheduler.timesteps
        self.pointer = timesteps.data_ptr() if timesteps.device.type != "meta" else -1
        self.size = timesteps.element_size()
        self.span = self.size * timesteps.numel() if timesteps.is_contiguous() else 0

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a scheduler finds what is made by itself

    @staticmethod
    def of(scheduler: Any) -> "Tables":
        state = scheduler.__dict__
        tables: Tables | None = state.get("_aigc_fast_tables")
        if tables is not None:
            for name, tensor, version in tables.read:
                if state.get(name) is not tensor or (
                    version is not None and tensor._version != version
                ):
                    break
            else:
                if (
                    state.get("num_inference_steps") == tables.count
                    and state.get("_internal_dict") is tables.config
                ):
                    return tables
        tables = state["_aigc_fast_tables"] = Tables(scheduler, tables)
        return tables

    def index(self, timestep: float | Tensor) -> int | None:
        """Where `timestep` stands in the schedule. A view of the schedule's own tensor, what a
        loop over it yields, is found by its address: its value is not read."""
        if isinstance(timestep, Tensor):
            at = timestep.data_ptr() - self.pointer
            if 0 <= at < self.span and timestep.dim() == 0:
                return at // self.size
            if timestep.numel() != 1:
                return None
            timestep = timestep.item()
        if self.index_of is None:
            places = reversed(list(enumerate(self.values())))
            self.index_of = {value: place for place, value in places}
        return self.index_of.get(timestep)

    def values(self) -> list[float]:
        """The timesteps as numbers; read from their device once."""
        if self.numbers is None:
            self.numbers = self.timesteps.tolist()
        return self.numbers

    def look_again(self, scheduler: Any) -> None:
        """Before something is made: what was changed in place since is another schedule, and must
        not be found by those that have the first."""
        self.frozen_config = frozen(configuration(scheduler))
        found = made_for(scheduler, self.frozen_config)
        if found is not None:
            self.made = found
        elif self.shared:
            self.made = {}
        self.shared = found is not None


def once(scheduler: Any, key: Any, build: Callable[[], Any]) -> Any:
    """build(), made once for each schedule and key; build depends on these alone."""
    tables = Tables.of(scheduler)
    if key not in tables.made:
        tables.look_again(scheduler)
    made = tables.made
    if key not in made:
        # Steps that no solver takes may divide by zero.
        with plainly(), torch.no_grad(), np.errstate(all="ignore"):
            made[key] = build()
    return made[key]


def steps_of(scheduler: Any, device: torch.device, build: Any, *key: Any) -> list[Step]:
    """The steps of `build(scheduler, *key)`, on the device of the samples; made once."""
    steps: list[Step] | None = Tables.of(scheduler).made.get((build, device, key))
    if steps is not None:
        return steps
    count = len(scheduler.timesteps)
    return once(
        scheduler, (build, device, key), lambda: build(scheduler, *key).steps(count, device)
    )


# ---- one schedule in many schedulers ------------------------------------------------------------

#: What is made is computed from a scheduler's class, its configuration, and these.
TENSORS = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "alphas_cumprod",
           "alphas", "betas")  # fmt: skip
OTHERS = ("num_inference_steps", "variance_type", "predict_x0", "tau_func")


def version_of(tensor: Tensor) -> int | None:
    """How often it was changed in place; None for a tensor of inference_mode, which does not
    count that."""
    return None if tensor.is_inference() else tensor._version


def tensors_read(state: dict[str, Any]) -> list[tuple[str, Tensor, int | None]]:
    """(name, tensor, version) of those that steps read, not of what these come from: looking at one
    takes 0.08 us."""
    left_out = ["alphas", "betas"] if "alphas_cumprod" in state else []
    if "sigmas_interpol" in state:
        left_out += ["alphas_cumprod", "timesteps"]
    found = {name: state.get(name) for name in TENSORS if name not in left_out}
    return [(name, v, version_of(v)) for name, v in found.items() if isinstance(v, Tensor)]


def made_for(scheduler: Any, config: Any) -> dict[Any, Any] | None:
    """What is made of this schedule already: by this scheduler before another set_timesteps, or by
    another of its class. Making it takes as long as some dozens of steps.

    None for what cannot be read or compared at no cost, tensors on a GPU, which would be waited
    for; and for what runs in a TorchDispatchMode, whose tensors may be fakes.
    """
    if _get_current_dispatch_mode() is not None:
        return None
    state = scheduler.__dict__
    try:
        tensors = tuple(content(state[name]) for name in TENSORS if name in state)
        cls: Any = type(scheduler)
        return _made(cls, config, tensors, tuple(map(state.get, OTHERS)))
    except (TypeError, RuntimeError):  # of Tensor.numpy, and of what has no hash
        return None


@functools.lru_cache(maxsize=64)  # a thousand steps take 0.5 MB
def _made(*schedule: Any) -> dict[Any, Any]:
    return {}


def content(values: Any) -> Any:
    """Equal for equal tensors; that of diffusers' before set_timesteps may be None."""
    return (values.dtype, values.numpy().tobytes()) if isinstance(values, Tensor) else values


def configuration(scheduler: Any) -> dict[str, Any]:
    config = scheduler.__dict__.get("_internal_dict")
    if config is None:  # a scheduler of ours is its own
        config = {field.name: getattr(scheduler, field.name) for field in fields(scheduler)}
    return config


def frozen(value: Any) -> Any:
    """With tuples for lists and dicts, which have no hash."""
    if isinstance(value, dict):
        return tuple((key, frozen(item)) for key, item in value.items())
    return tuple(map(frozen, value)) if isinstance(value, list) else value

"""diffusers' steps replayed bit for bit: what `install(exact=True)` puts into its classes.

The first time a scheduler comes to a step, diffusers' own method runs and is watched
(diffusers_watch.py). Where it consists of elementwise operators, the next time they run as one
program. What a step is known by: all that the scheduler holds, the timestep, the options, and the
shape, strides and dtype of each tensor.
"""

import functools
import inspect
from collections.abc import Callable
from operator import is_
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from aigc_fast.integrations.diffusers_watch import Plan, watched
from aigc_fast.ops._autograd import transforming
from aigc_fast.schedulers.tables import content, frozen

PLAIN = frozenset((int, float, bool, str, type(None)))
#: steps of a schedule; those of a hundred sizes of samples take some MB
MOST_PLANS = 4096

Plans = dict[Any, Plan | None]


class _Fixed:
    """What a scheduler holds that no step changes, and the plans of steps with it."""

    def __init__(self, cls: type, objects: list[Any]) -> None:
        self.objects = objects
        self.tensors = [x for x in objects if isinstance(x, Tensor) and not x.is_inference()]
        self.versions = [x._version for x in self.tensors]
        try:
            self.plans = _plans(cls, *map(_content, objects))
        except (TypeError, RuntimeError):  # of Tensor.numpy, and of what has no hash
            self.plans = {}

    def holds(self, objects: list[Any]) -> bool:
        return (
            len(objects) == len(self.objects)
            and all(map(is_, objects, self.objects))
            and [x._version for x in self.tensors] == self.versions
        )


@functools.lru_cache(maxsize=64)
def _plans(cls: type, *contents: Any) -> Plans:
    return {}


def _content(value: Any) -> Any:
    """Equal for what is the same to a step."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, FunctionType) and value.__closure__ is None:
        return value.__code__, value.__defaults__  # SASolver has one for each scheduler
    return frozen(dict(value)) if isinstance(value, dict) else content(value)


_fixed: WeakKeyDictionary[Any, _Fixed] = WeakKeyDictionary()


def _plans_of(scheduler: Any, objects: list[Any]) -> Plans:
    fixed = _fixed.get(scheduler)
    if fixed is None or not fixed.holds(objects):
        fixed = _fixed[scheduler] = _Fixed(type(scheduler), objects)
    return fixed.plans


class _Situation:
    """What a step is known by: `key`, and `objects` that are compared by identity; `tensors` are
    what it computes with."""

    __slots__ = ("key", "objects", "shape", "tensors")

    def __init__(self, scheduler: Any, output: Tensor, sample: Tensor, others: list[Any]) -> None:
        state = scheduler.__dict__
        self.shape = sample.shape
        self.tensors = [output, sample]
        self.objects: list[Any] = []
        self.key: list[Any] = [self.shape, torch.is_inference_mode_enabled(), *state]
        for value in state.values():
            self.add(value)
        for value in others:
            self.add(value)

    def add(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN:
            self.key += (kind, value)
        elif kind is Tensor:
            if value.shape == self.shape:
                self.tensors.append(value)
                self.key.append(Tensor)
            elif value.dim() == 0 and value.is_cpu:
                self.key += (value.dtype, value.item())
            else:
                self.objects.append(value)
        elif kind is list:
            self.key += (list, len(value))
            for member in value:
                self.add(member)
        else:
            self.objects.append(value)

    def complete(self) -> tuple | None:
        """The key, or None for what is left to the stock method."""
        tensors = self.tensors
        for x in tensors:
            if not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
                return None
            self.key += (x.dtype, x.stride())
        addresses = list(map(id, tensors))
        if len(set(addresses)) < len(addresses):  # one tensor in two roles
            self.key.append(tuple(map(addresses.index, addresses)))
        return tuple(self.key)


def _is_known(option: Any, sample: Tensor) -> bool:
    """Whether it is kept in mind by its value, or computed with."""
    kind = type(option)
    if kind is Tensor:
        return option.is_cpu and (option.dim() == 0 or option.shape == sample.shape)
    return kind in PLAIN or kind is torch.Generator


def exact_step(stock: Callable, warns: bool) -> Callable:
    """`stock`, a class's step, with replays. `warns`: of a loop without scale_model_input."""
    names = list(inspect.signature(stock).parameters)[4:]

    @functools.wraps(stock)
    def step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **options: Any
    ) -> Any:
        options.update(zip(names, args, strict=False))
        if not (
            type(sample) is Tensor
            and type(model_output) is Tensor
            and sample.shape == model_output.shape
            and sample.dim() > 0
            and (not warns or self.is_scale_input_called)
            and not torch.compiler.is_compiling()
            and not transforming()
            and _get_current_dispatch_mode() is None
            and all(_is_known(x, sample) for x in (timestep, *options.values()))
        ):
            return stock(self, model_output, timestep, sample, **options)
        run = functools.partial(stock, self, model_output, timestep, sample, **options)
        generator = options.pop("generator", None)
        situation = _Situation(self, model_output, sample, [timestep, *options, *options.values()])
        key = situation.complete()
        if key is None:
            return run()
        plans = _plans_of(self, situation.objects)
        tensors = situation.tensors
        if key not in plans:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            result, plans[key] = watched(self, run, tensors, timestep, generator)
            return result
        plan = plans[key]
        return run() if plan is None else plan.replay(self, tensors, timestep, generator)

    return step

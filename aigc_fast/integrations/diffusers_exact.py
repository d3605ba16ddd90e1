"""diffusers' steps replayed bit for bit: what `install(exact=True)` puts into its classes.

The first time a scheduler comes to a step, diffusers' own method runs and is watched
(diffusers_watch.py). Where it consists of elementwise operators, the next time they run as one
program (diffusers_plan.py). What a step is known by: all that the scheduler holds, the timestep,
the options, and the shape, strides and dtype of each tensor.
"""

import functools
import inspect
from collections.abc import Callable
from operator import is_, itemgetter
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from aigc_fast.integrations.diffusers_plan import Plan, watched
from aigc_fast.ops._autograd import transforming
from aigc_fast.schedulers.tables import Tables, content, frozen

PLAIN = frozenset((int, float, bool, str, type(None)))
#: steps of a schedule; those of a hundred sizes of samples take some MB
MOST_PLANS = 4096

Plans = dict[Any, Plan | None]


class _Layout:
    """The attributes of a scheduler by what becomes of them; found by their names and types, which
    few steps change."""

    def __init__(self, names: tuple[str, ...], types: tuple[type, ...]) -> None:
        kinds = dict(zip(names, types, strict=True))
        plain = [name for name, kind in kinds.items() if kind in PLAIN]
        self.plain = _getter(plain)
        self.tensors = [name for name, kind in kinds.items() if kind is Tensor]
        self.lists = [name for name, kind in kinds.items() if kind is list]
        known = {*plain, *self.tensors, *self.lists}
        # What the fast step keeps there is no matter of this one.
        self.others = [n for n, kind in kinds.items() if n not in known and kind is not Tables]


_layout = functools.lru_cache(maxsize=1024)(_Layout)


def _getter(names: list[str]) -> Callable[[dict[str, Any]], tuple]:
    # The first comes twice: of one name alone itemgetter gives no tuple.
    return itemgetter(*names, names[0]) if names else lambda state: ()


class _Fixed:
    """What a scheduler holds that steps do not change, and the plans of steps with it. While its
    objects are the same ones no step looks at them: that would take as long as all else."""

    def __init__(self, scheduler: Any, layout: _Layout, sample: Tensor) -> None:
        state = scheduler.__dict__
        self.varying = [n for n in layout.tensors if _varies(state[n], sample)]
        names = [n for n in (*layout.tensors, *layout.others) if n not in self.varying]
        self.get = _getter(names)
        self.objects = self.get(state)
        self.tensors = [x for x in self.objects if isinstance(x, Tensor) and not x.is_inference()]
        self.versions = [x._version for x in self.tensors]
        try:
            contents = zip(names, map(_content, self.objects), strict=False)
            cls: Any = type(scheduler)
            self.plans = _plans(cls, layout, *contents)
        except (TypeError, RuntimeError):  # of Tensor.numpy, and of what has no hash
            self.plans = {}

    def holds(self, state: dict[str, Any]) -> bool:
        return (
            all(map(is_, self.get(state), self.objects))
            and [x._version for x in self.tensors] == self.versions
        )


def _varies(x: Tensor, sample: Tensor) -> bool:
    """Whether steps may change it: what has the sample's shape, and numbers."""
    return x.shape == sample.shape or (x.dim() == 0 and x.is_cpu)


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


_fixed: WeakKeyDictionary[Any, dict[_Layout, _Fixed]] = WeakKeyDictionary()


def _fixed_of(scheduler: Any, layout: _Layout, sample: Tensor) -> _Fixed:
    known = _fixed.get(scheduler)
    if known is None:
        known = _fixed[scheduler] = {}
    fixed = known.get(layout)
    if fixed is None or not fixed.holds(scheduler.__dict__):
        fixed = known[layout] = _Fixed(scheduler, layout, sample)
    return fixed


class _Unfit(Exception):
    """What is left to the stock method."""


def _situation(
    scheduler: Any, output: Tensor, sample: Tensor, others: list[Any]
) -> tuple[Plans, tuple, list[Tensor]]:
    """The plans of steps with the same schedule, the key of this step, and the tensors that it
    computes with."""
    state = scheduler.__dict__
    layout = _layout(tuple(state), tuple(map(type, state.values())))
    fixed = _fixed_of(scheduler, layout, sample)
    modes = torch.is_inference_mode_enabled(), torch.get_default_dtype()
    key = [sample.shape, *modes, *layout.plain(state)]
    tensors = [output, sample]
    for name in fixed.varying:
        _add_tensor(state[name], key, tensors)
    for name in layout.lists:
        _add_members(state[name], key, tensors)
    _add_members(others, key, tensors)
    grad = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or (grad and x.requires_grad):
            raise _Unfit
        key.append(x.dtype)
        key.append(x.stride())
    if len(set(map(id, tensors))) < len(tensors):  # one tensor in two roles
        addresses = list(map(id, tensors))
        key.append(tuple(map(addresses.index, addresses)))
    return fixed.plans, tuple(key), tensors


def _add_tensor(x: Tensor, key: list[Any], tensors: list[Tensor]) -> None:
    if x.dim() == 0 and x.is_cpu:
        key.append(x.dtype)
        key.append(x.item())
    elif x.shape == tensors[1].shape:
        tensors.append(x)
        key.append(Tensor)
    else:
        raise _Unfit


def _add_members(members: list[Any], key: list[Any], tensors: list[Tensor]) -> None:
    key.append(len(members))
    for x in members:
        kind = type(x)
        key.append(kind)
        if kind in PLAIN:
            key.append(x)
        elif kind is Tensor:
            _add_tensor(x, key, tensors)
        elif kind is list:
            _add_members(x, key, tensors)
        else:
            raise _Unfit


def exact_step(stock: Callable, warns: bool) -> Callable:
    """`stock`, a class's step, with replays. `warns`: of a loop without scale_model_input."""
    names = list(inspect.signature(stock).parameters)[4:]
    takes_generator = "generator" in names

    @functools.wraps(stock)
    def step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **options: Any
    ) -> Any:
        if args:
            options.update(zip(names, args, strict=False))
        generator = options.pop("generator", None) if takes_generator else None
        plans: Plans | None = None
        if (
            type(sample) is Tensor
            and type(model_output) is Tensor
            and sample.shape == model_output.shape
            and sample.dim() > 0
            and (not warns or self.is_scale_input_called)
            and (generator is None or type(generator) is torch.Generator)
            and not torch.compiler.is_compiling()
            and not transforming()
            and _get_current_dispatch_mode() is None
        ):
            try:
                plans, key, tensors = _situation(
                    self, model_output, sample, [timestep, *options, *options.values()]
                )
            except _Unfit:
                pass
            else:
                plan = plans.get(key)
                if plan is not None:
                    return plan.replay(self, tensors, timestep, generator)
        if takes_generator:
            options["generator"] = generator
        if plans is None or key in plans:
            return stock(self, model_output, timestep, sample, **options)
        if len(plans) >= MOST_PLANS:
            plans.clear()
        run = functools.partial(stock, self, model_output, timestep, sample, **options)
        result, plans[key] = watched(self, run, tensors, timestep, generator)
        return result

    return step

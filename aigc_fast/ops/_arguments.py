"""The words for arguments whose type is not that of their annotation."""

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

#: annotation: (its name in a message, what is taken for it)
_TYPES: dict[Any, tuple[str, Any]] = {
    Tensor: ("a torch.Tensor", Tensor),
    bool: ("a bool", (Integral, torch.SymBool)),
    int: ("an int", (Integral, torch.SymInt)),
    float: ("a float", (Real, torch.SymInt, torch.SymFloat)),
    str: ("a str", str),
    torch.dtype: ("a torch.dtype", torch.dtype),
    types.NoneType: ("None", types.NoneType),
}


def check_types(function: Callable[..., Any], arguments: Mapping[str, object]) -> None:
    """TypeError that names the first of a call's arguments that has not its annotated type."""
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        problem = _misfit(name, value, parameters[name].annotation)
        if problem:
            raise TypeError(problem)


def _misfit(name: str, value: object, annotation: Any) -> str:
    """What is wrong with a value, or nothing."""
    kinds = get_args(annotation) if _is_union(annotation) else (annotation,)
    problems = [_misfit_of(name, value, kind) for kind in kinds]
    if not all(problems):
        return ""
    # Of a sequence that may be one, what is wrong is a member, or how many there are.
    inside = next((p for p in problems if not p.startswith(f"{name} must be ")), "")
    words = " or ".join(map(_words, kinds))
    return inside or f"{name} must be {words}, got {type(value).__name__}"


def _misfit_of(name: str, value: object, kind: Any) -> str:
    problem = f"{name} must be {_words(kind)}, got {type(value).__name__}"
    if kind in (int, float) and isinstance(value, Tensor) and value.dim() == 0:
        return ""  # torch takes it for a number
    if kind in _TYPES:
        return "" if isinstance(value, _TYPES[kind][1]) else problem
    if get_origin(kind) in (None, Literal):  # Any; choices, which torch's modules check
        return ""
    if isinstance(value, Tensor | str) or not isinstance(value, Iterable):
        return problem
    if isinstance(value, list | tuple):  # others, as generators, may be gone after one look
        if get_origin(kind) is tuple and ... not in get_args(kind):
            if len(value) != len(get_args(kind)):
                return f"{name} must have {len(get_args(kind))} members, got {len(value)}"
        for i, member in enumerate(value):
            found = _misfit(f"{name}[{i}]", member, get_args(kind)[0])
            if found:
                return found
    return ""


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _words(kind: Any) -> str:
    if kind in _TYPES:
        return _TYPES[kind][0]
    if get_origin(kind) is None:
        return "anything"
    member = _words(get_args(kind)[0]).removeprefix("a ").removeprefix("an ")
    return f"a sequence of {member}"

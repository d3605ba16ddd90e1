"""Whether two forwards are the same code.

transformers has no shared layers: every model brings its own copy of LlamaRMSNorm, LlamaMLP and so
on under another name. What serves the one serves the copies. A name proves nothing, so the compiled
code is compared, with that of every function and method which it refers to.
"""

import dis
import inspect
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any

#: Instructions that look up an attribute of something: if it is of self, its class may say what.
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def code_of(cls: type, name: str = "forward") -> Hashable:
    """What a method of cls does with the attributes of self: equal for two classes only where the
    instructions, constants, defaults and names are, and so are, in turn, the functions and methods
    that they name. A method that asks for `super()` equals no other."""
    return _meaning(inspect.getattr_static(cls, name), cls, ())


def _meaning(value: Any, cls: type, within: tuple[Callable, ...]) -> Hashable:
    if isinstance(value, staticmethod | classmethod):
        return type(value), _meaning(value.__func__, cls, within)
    if isinstance(value, property):
        return property, _meaning(value.fget, cls, within)
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if not isinstance(value, FunctionType) or value in within:
        return id(value)  # the very same object, of a module or class that stays
    return (
        tuple(_meaning(v, cls, within) for v in value.__defaults__ or ()),
        tuple((k, _meaning(v, cls, within)) for k, v in (value.__kwdefaults__ or {}).items()),
        _instructions(value.__code__, value, cls, (*within, value)),
    )


def _instructions(
    code: CodeType, function: FunctionType, cls: type, within: tuple[Callable, ...]
) -> Hashable:
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    handlers = getattr(code, "co_exceptiontable", None)  # from Python 3.11 on
    found: list[Hashable] = [counts, code.co_flags, code.co_varnames, handlers]
    for step in dis.get_instructions(code):
        value = step.argval
        if isinstance(value, CodeType):
            found.append(_instructions(value, function, cls, within))
            continue
        found += [step.opname, repr(value)]  # 1, 1.0 and True are equal
        if step.opname == "LOAD_GLOBAL":
            held = function.__globals__.get(value)
            found.append(_meaning(held, cls, within))
        elif step.opname in _ATTRIBUTES:
            held = inspect.getattr_static(cls, value, None)
            found.append(_meaning(held, cls, within))
        elif value == "__class__":
            found.append(id(cls))
        elif value in cells:
            found.append(_meaning(cells[value].cell_contents, cls, within))
    return tuple(found)

"""Making modules of a model ours, reversibly.

The module stays the very object that it was, with its parameters, buffers, hooks and children, and
its class becomes a subclass of its own class with another `forward`. So state dicts, optimizers,
isinstance and hooks notice nothing.
"""

import copyreg
import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn


class Missing:
    """Stands for an attribute that was not there."""


class Assignment(NamedTuple):
    """owner.attribute = value, to be."""

    owner: Any
    attribute: str
    value: Any


class Change(NamedTuple):
    """An assignment that was made, and what it displaced."""

    owner: Any
    attribute: str
    value: Any
    original: Any

    def undo(self) -> None:
        # Whoever assigned after us keeps what they assigned.
        if getattr(self.owner, self.attribute, Missing) != self.value:
            return
        if self.original is Missing:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.original)


class Unfit(Exception):
    """Why a module that could be replaced must keep its own forward."""


def carry_out(planned: Iterable[Assignment]) -> list[Change]:
    """Makes the assignments, and says which of them changed something."""
    changes = []
    for owner, attribute, value in planned:
        original = getattr(owner, attribute, Missing)
        if original is not value:
            setattr(owner, attribute, value)
            changes.append(Change(owner, attribute, value, original))
    return changes


def take_back(model: nn.Module, record: str) -> bool:
    """Undoes the changes that are kept under this name on `model` or on a module inside it, and
    says whether there were any."""
    records = [module.__dict__.pop(record, ()) for module in model.modules()]
    for changes in records:
        for change in reversed(changes):
            change.undo()
    return any(records)


class _FastType(type):
    """The classes made on the fly, for pickle to know them by."""


@functools.cache
def fast_class(replacement: Any, stock: Any) -> Any:
    """The subclass of both; the same one every time."""
    name = f"Fast{stock.__name__}"
    return _FastType(name, (replacement, stock), {"__module__": replacement.__module__})


def _reduce(cls: type) -> tuple[Any, ...]:
    return fast_class, cls.__bases__


copyreg.pickle(_FastType, _reduce)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` or `fuse` found in a model.

    model:    the class of the model.
    replaced: stock class, or classes -> (modules, operators that they call now).
    kept:     class -> (modules, why they stayed as they are).
    """

    model: str
    replaced: dict[str, tuple[int, str]] = field(default_factory=dict)
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: type, replaced: Counter[tuple[str, str]], kept: Counter[tuple[str, str]]
    ) -> "PatchReport":
        """From the number of each (class, text)."""

        def rows(counts: Counter[tuple[str, str]]) -> dict[str, tuple[int, str]]:
            merged: dict[str, tuple[int, str]] = {}
            for (name, text), n in counts.items():
                number, texts = merged.get(name, (0, ""))
                merged[name] = number + n, f"{texts}; {text}" if texts else text
            return merged

        return cls(model.__name__, rows(replaced), rows(kept))

    def __str__(self) -> str:
        lines = [f"{self.model}: {sum(n for n, _ in self.replaced.values())} modules replaced"]
        for title, rows in (("replaced", self.replaced), ("kept", self.kept)):
            width = max(map(len, rows), default=0)
            lines += [f"  {title}"] if rows else []
            lines += [f"    {name:{width}}  {n:4d}  {text}" for name, (n, text) in rows.items()]
        return "\n".join(lines)


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call of the module is the forward of its class and nothing else: no hooks, and no
    forward on the object."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in module.__dict__

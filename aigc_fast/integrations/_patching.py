"""Replacing parts of a stock model, reversibly.

A patch is a list of assignments to attributes, kept on the model with what stood there before. Most
assign to `__class__`: the module stays the very object that it was, with its parameters, buffers,
hooks and children, and its class becomes a subclass of its own class with another `forward`. So
state dicts, optimizers, isinstance, adapters and hooks notice nothing.
"""

import copyreg
import functools
import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

#: package of a stock class -> the module that says what takes the place of its classes: TABLE, by
#: the full name of the class
INTEGRATIONS = {
    "diffusers": "aigc_fast.integrations.diffusers_models",
    "transformers": "aigc_fast.integrations.transformers",
}
_RECORD = "_aigc_fast_patch"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


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
        if getattr(self.owner, self.attribute) == self.value:
            setattr(self.owner, self.attribute, self.original)


class Unfit(Exception):
    """Why a module of a class that the table has must keep its own forward."""


class Replacement(nn.Module):
    """Base of the rows of a table: goes in front of the stock class, whose forward is super()'s."""

    #: the operators that it brings, for the report
    uses = ""
    #: children whose work it does itself
    absorbs: tuple[str, ...] = ()

    if TYPE_CHECKING:  # the attributes of the stock class

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def assignments(cls, module: nn.Module) -> Iterable[Assignment]:
        """What makes `module` ours; Unfit where it cannot be. Reads, and changes nothing."""
        fast = fast_class(cls, type(module))  # type: ignore[arg-type]  # classes do hash
        yield Assignment(module, "__class__", fast)


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
    """What `patch` found in a model.

    model:    the class of the model.
    replaced: stock class -> (modules, operators that they call now).
    kept:     class -> (modules, why they stayed as they are).
    """

    model: str
    replaced: dict[str, tuple[int, str]] = field(default_factory=dict)
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}: {sum(n for n, _ in self.replaced.values())} modules replaced"]
        for title, rows in (("replaced", self.replaced), ("kept", self.kept)):
            width = max(map(len, rows), default=0)
            lines += [f"  {title}"] if rows else []
            lines += [f"    {name:{width}}  {n:4d}  {text}" for name, (n, text) in rows.items()]
        return "\n".join(lines)


def patch(model: Any) -> PatchReport:
    """Makes the parts of a stock model that are known here call aigc_fast's operators, in place.

    model: a model of transformers (Llama, Mistral, Qwen2, Qwen3, Gemma-2, GPT-2) or of diffusers
           (UNet2D, UNet2DCondition, AutoencoderKL, DiT, SD3, Flux, Wan), any module that has one
           inside, such as PEFT's, or a pipeline of diffusers, all models of which are patched. Of
           any other model nothing is changed.

    Modules, parameters, the names in state dicts and hooks stay. Outputs agree to rounding, in
    training too. Patching again changes nothing. Within torch.compile the stock code runs, which
    the compiler fuses by itself. `unpatch` takes it all back; a deep copy or pickle of a patched
    model is patched. Hooks on modules whose work another does (an activation inside a gated MLP,
    the norms of a residual block) do not run while it is patched.

    Returns what was replaced and what was not, and why. TypeError if `model` is neither a module
    nor a pipeline.
    """
    replaced: Counter[tuple[str, str]] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    for part in _models(model):
        _patch(part, replaced, kept)
    return PatchReport(_stock(model).__name__, _rows(replaced), _rows(kept))


def _patch(
    model: nn.Module, replaced: Counter[tuple[str, str]], kept: Counter[tuple[str, str]]
) -> None:
    changes: list[Change] = []
    absorbed: set[nn.Module] = set()
    for module in list(model.modules()):
        if isinstance(module, Replacement):
            replaced[_stock(module).__name__, module.uses] += 1
            absorbed.update(getattr(module, child) for child in module.absorbs)
            continue
        row = _row(type(module))
        name = type(module).__name__
        try:
            if row is None:
                raise Unfit("no replacement is known")
            if "forward" in module.__dict__:
                raise Unfit("its forward was replaced on the object")
            planned = list(row.assignments(module))
        except Unfit as reason:
            if not isinstance(module, _CONTAINERS) and module not in absorbed:
                kept[name, str(reason)] += 1
            continue
        for owner, attribute, value in planned:
            original = getattr(owner, attribute)
            if original is not value:
                setattr(owner, attribute, value)
                changes.append(Change(owner, attribute, value, original))
        replaced[name, row.uses] += 1
        absorbed.update(getattr(module, child) for child in row.absorbs)
    if changes:
        model.__dict__.setdefault(_RECORD, []).extend(changes)


def unpatch(model: Any) -> None:
    """Takes back what `patch` did to `model` or to a module inside it; else does nothing.

    Every attribute holds the very object that it held before, unless someone assigned to it since.
    TypeError if `model` is neither a module nor a pipeline.
    """
    for part in _models(model):
        for module in list(part.modules()):
            for change in reversed(module.__dict__.pop(_RECORD, ())):
                change.undo()


def _models(model: Any) -> list[nn.Module]:
    """The module itself, or those of a pipeline."""
    if isinstance(model, nn.Module):
        return [model]
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"model must be a torch.nn.Module or a pipeline of them, got {type(model).__name__}"
        )
    return [part for part in components.values() if isinstance(part, nn.Module)]


def _row(cls: type) -> type[Replacement] | None:
    integration = INTEGRATIONS.get(cls.__module__.partition(".")[0])
    if integration is None:
        return None
    return importlib.import_module(integration).TABLE.get(f"{cls.__module__}.{cls.__qualname__}")


def _stock(module: Any) -> type:
    return next(c for c in type(module).__mro__ if not issubclass(c, Replacement))


def become(replacement: type[Replacement], child: nn.Module) -> Assignment:
    """What makes `child` ours where its parent decides it, whose own class need not change."""
    if "forward" in child.__dict__:
        raise Unfit(f"the forward of its {_stock(child).__name__} was replaced on the object")
    fast = fast_class(replacement, _stock(child))  # type: ignore[arg-type]  # classes do hash
    return Assignment(child, "__class__", fast)


def _rows(counts: Counter[tuple[str, str]]) -> dict[str, tuple[int, str]]:
    return {name: (n, text) for (name, text), n in counts.items()}

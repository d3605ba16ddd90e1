"""Which modules run one right after another, as torch.fx sees the forward that calls them."""

import copy
import inspect
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

#: Arguments that can be left out of a forward, at most: each doubles the ways that it may go.
_OPTIONAL = 4


def runs(
    model: nn.Module, ends: set[nn.Module], modes: Collection[bool] = (True, False)
) -> Iterator[list[nn.Module]]:
    """For every call of a module that is seen: the run of modules that ends with it, each of whose
    results goes to the next one alone.

    Looks into the forward of every module with one of `ends` inside, in training and in evaluation
    (`modes`), with and without each argument that can be left out: a run is what all of these ways
    have in common. Forwards that torch.fx cannot trace, or that call other modules in another way,
    have none. Runs on a copy without memory, so that nothing that a forward keeps stays in `model`;
    what cannot be copied has no runs.
    """
    try:
        twin = copy.deepcopy(model, {id(t): _without_memory(t) for t in _tensors(model)})
    except Exception:  # the code of others may fail in any way
        return
    for name, module in model.named_modules():
        if ends.isdisjoint(module.modules()):
            continue
        for paths in _common(list(_ways(twin.get_submodule(name), modes))):
            yield [model.get_submodule(f"{name}.{path}".strip(".")) for path in paths]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _ways(module: nn.Module, modes: Collection[bool]) -> Iterator[list[list[str]] | None]:
    """What `_trace` finds in every mode and with every choice of arguments."""
    forward: Any = type(module).forward
    parameters = list(inspect.signature(forward).parameters.values())
    optional = [p for p in parameters if p.default is not p.empty]
    if (
        "forward" in module.__dict__
        or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        or len(optional) > _OPTIONAL
    ):
        return
    # What a flag decides tells its other value; what another argument decides torch.fx refuses.
    choices = [
        [{p.name: True}, {p.name: False}] if type(p.default) is bool else [{p.name: p.default}, {}]
        for p in optional
    ]
    for mode in modes:
        for given in itertools.product(*choices):
            yield _trace(module.train(mode), {k: v for some in given for k, v in some.items()})


def _trace(module: nn.Module, fixed: dict[str, Any]) -> list[list[str]] | None:
    """For every module that is called: the run that ends with it, by their names; None where it
    cannot be seen. fixed: the arguments that are no unknowns."""
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(module, fixed or None)
    except Exception:
        return None
    return [_run(node) for node in graph.nodes if node.op == "call_module"]


def _common(ways: list[list[list[str]] | None]) -> list[list[str]]:
    """The ends of runs that are the same in all ways, if these call the same modules."""
    if None in ways or len({tuple(run[-1] for run in way or ()) for way in ways}) != 1:
        return []
    found = []
    for same_call in zip(*(way or () for way in ways), strict=True):
        steps = zip(*(reversed(run) for run in same_call), strict=False)
        alike = itertools.takewhile(lambda step: len(set(step)) == 1, steps)
        found.append([step[0] for step in alike][::-1])
    return found


def _run(node: fx.Node) -> list[str]:
    run = [str(node.target)]
    while len(node.args) == 1 and not node.kwargs:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            break
        node = source
        run.insert(0, str(node.target))
    return run

"""Which modules run one right after another, as torch.fx sees the forward that calls them."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn


def runs(model: nn.Module, ends: set[nn.Module]) -> Iterator[list[nn.Module]]:
    """For every call of a module that is seen: the run of modules that ends with it, each of whose
    results goes to the next one alone.

    Looks into the forward of every module with one of `ends` inside, in training and in evaluation,
    but for those that torch.fx cannot trace, or that may go other ways: by an argument that can be
    left out. Runs on a copy without memory, so that nothing that a forward keeps stays in `model`;
    what cannot be copied has no runs.
    """
    try:
        twin = copy.deepcopy(model, {id(t): _without_memory(t) for t in _tensors(model)})
    except Exception:  # the code of others may fail in any way
        return
    for name, module in model.named_modules():
        if ends.isdisjoint(module.modules()):
            continue
        graphs = [_trace(twin.get_submodule(name).train(mode)) for mode in (True, False)]
        if None in graphs or graphs[0] != graphs[1]:
            continue
        for paths in graphs[0] or ():
            yield [model.get_submodule(f"{name}.{path}".strip(".")) for path in paths]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _trace(module: nn.Module) -> list[list[str]] | None:
    """For every module that is called: the run that ends with it, by their names."""
    forward: Any = type(module).forward
    parameters = list(inspect.signature(forward).parameters.values())
    if "forward" in module.__dict__ or any(
        p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters
    ):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(module)
    except Exception:
        return None
    return [_run(node) for node in graph.nodes if node.op == "call_module"]


def _run(node: fx.Node) -> list[str]:
    run = [str(node.target)]
    while len(node.args) == 1 and not node.kwargs:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            break
        node = source
        run.insert(0, str(node.target))
    return run

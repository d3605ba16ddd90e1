"""What a step of a scheduler of diffusers does, to be done again without it: draws of noise, a
program, changes of the scheduler's attributes, a result."""

import dataclasses
from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aigc_fast.integrations.diffusers_watch import Unknown, Watch
from aigc_fast.ops._registry import FLOATS
from aigc_fast.ops.pointwise_program import instruction, run

IMMUTABLE = (int, float, bool, str, type(None), torch.Size)
#: A value of a step by where it comes from: an object as it is, a place among the tensors, the
#: timestep, a list of such.
LITERAL, PLACE, TIMESTEP, SEVERAL = range(4)
Source = tuple[int, Any]


def _have(source: Source, tensors: list[Tensor], timestep: Any) -> Any:
    kind, what = source
    if kind == PLACE:
        return tensors[what]
    if kind == LITERAL:
        return what
    return timestep if kind == TIMESTEP else [_have(s, tensors, timestep) for s in what]


class Plan(NamedTuple):
    """A step. The program reads given tensors and noise; changes of the scheduler's attributes, and
    the result, are made of these and of what the program returns."""

    draws: list[tuple[Any, tuple, dict]]
    reads: list[int]
    code: list[int]
    scalars: list[float]
    changes: list[tuple[str, bool, Source]]  # whether a list stays the same object
    output: type
    names: list[str] | None  # of the result's fields
    values: Source

    def replay(self, scheduler: Any, given: list[Tensor], timestep: Any, generator: Any) -> Any:
        tensors = list(given)
        for func, args, kwargs in self.draws:
            tensors.append(func(*args, **(kwargs | {"generator": generator})))
        if self.code:
            tensors += run([tensors[i] for i in self.reads], self.code, self.scalars)
        state = scheduler.__dict__
        for name, in_place, source in self.changes:
            value = _have(source, tensors, timestep)
            if in_place:
                state[name][:] = value
            else:
                state[name] = value
        values = _have(self.values, tensors, timestep)
        if self.names is None:
            return self.output(values)
        return self.output(**dict(zip(self.names, values, strict=True)))


class _Planner:
    """Finds where values come from, and the program for those that are computed."""

    def __init__(self, watch: Watch, shape: torch.Size, timestep: Any) -> None:
        self.watch, self.shape, self.timestep = watch, shape, timestep
        self.leaves = [i for i, n in enumerate(watch.nodes) if n.name in ("given", "randn")]
        self.results: list[int] = []  # nodes

    def source(self, value: Any) -> Source:
        if type(value) is list:
            return SEVERAL, [self.source(member) for member in value]
        if not isinstance(value, Tensor):
            if not isinstance(value, IMMUTABLE):
                raise Unknown
            return LITERAL, value
        if value is self.timestep:
            return TIMESTEP, None
        number = self.watch.at(value)
        if number is None:
            if value.dim() > 0:  # a number of the schedule may be had by many, and no more
                raise Unknown
            return LITERAL, value
        if value.shape != self.shape:
            raise Unknown
        if number in self.leaves:
            if self.watch.nodes[number].tensor.stride() != value.stride():
                raise Unknown
            return PLACE, self.leaves.index(number)
        if number not in self.results:
            self.results.append(number)
        return PLACE, len(self.leaves) + self.results.index(number)

    def program(self) -> tuple[list[int], list[int], list[float]]:
        """(places that it reads, code, scalars)"""
        nodes, needed, ahead = self.watch.nodes, set(), list(self.results)
        while ahead:
            number = ahead.pop()
            if number not in needed:
                needed.add(number)
                if number not in self.leaves:
                    ahead += [x for x in nodes[number].operands if type(x) is int]
        reads = [number for number in self.leaves if number in needed]
        place = {number: i for i, number in enumerate(reads)}
        code: list[int] = []
        scalars: list[float] = []
        for number in sorted(needed - place.keys()):
            name, operands, _ = nodes[number]
            words = []
            for x in operands:
                if type(x) is float:
                    scalars.append(x)
                    words.append(len(scalars) - 1)
                else:
                    words.append(place[x] if type(x) is int else FLOATS.index(x))
            code.append(instruction(name, *words))
            place[number] = len(place)
        code += [instruction("return", place[number]) for number in self.results]
        return [self.leaves.index(number) for number in reads], code, scalars


def _changes(before: dict, state: dict, planner: _Planner) -> list[tuple[str, bool, Source]]:
    """What the step has changed; before: name -> (value, members of a list)."""
    changes = []
    for name, value in state.items():
        old, members = before.get(name, (before, None))
        in_place = members is not None and old is value
        if in_place and len(members) == len(value) and all(map(is_, members, value)):
            continue
        if in_place or old is not value:
            changes.append((name, in_place, planner.source(value)))
    if before.keys() - state.keys():
        raise Unknown
    return changes


def watched(
    scheduler: Any, step: Callable[[], Any], given: list[Tensor], timestep: Any, generator: Any
) -> tuple[Any, Plan | None]:
    """step(), and what does the same on other elements; None where no program does."""
    state = scheduler.__dict__
    before = {k: (v, list(v) if type(v) is list else None) for k, v in state.items()}
    fixed = [x for x in tree_leaves((timestep, list(state.values()))) if _has_version(x)]
    versions = [x._version for x in fixed]
    with Watch(given, generator) as watch:
        result = step()
    if not watch.known or versions != [x._version for x in fixed]:
        return result, None
    planner = _Planner(watch, given[1].shape, timestep)
    try:
        changes = _changes(before, state, planner)
        names = None
        if dataclasses.is_dataclass(result):
            names = [field.name for field in dataclasses.fields(result)]
        elif type(result) is not tuple:
            raise Unknown
        values = planner.source(
            list(result) if names is None else [getattr(result, name) for name in names]
        )
        reads, code, scalars = planner.program()
        nodes = watch.nodes
        draws = [nodes[i].operands for i in planner.leaves if nodes[i].name == "randn"]
        plan = Plan(draws, reads, code, scalars, changes, type(result), names, values)
        return result, plan if _proves(plan, planner) else None
    except Unknown:
        return result, None


def _has_version(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_inference()


def _proves(plan: Plan, planner: _Planner) -> bool:
    """Whether the program gives the bits, and the strides, that the step has just given: those of
    this version of torch, on this machine."""
    if not plan.code:
        return True
    nodes, leaves = planner.watch.nodes, planner.leaves
    try:
        got = run([nodes[leaves[i]].tensor for i in plan.reads], plan.code, plan.scalars)
    except TypeError:  # dtypes that no program mixes
        return False
    pairs = [(a, nodes[n].tensor) for a, n in zip(got, planner.results, strict=True)]
    return all(a.stride() == b.stride() and _same(a, b) for a, b in pairs)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

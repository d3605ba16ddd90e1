"""A step of a scheduler of diffusers, watched: the elementwise operators it consists of, and what
it leaves in the scheduler, to be had again without it."""

import dataclasses
from collections.abc import Callable
from math import inf
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aigc_fast.ops._registry import FLOATS
from aigc_fast.ops.pointwise_program import instruction, run

aten = torch.ops.aten
PAIRS = {
    aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.div.Tensor: "div",
    aten.add_.Tensor: "add", aten.sub_.Tensor: "sub", aten.mul_.Tensor: "mul",
    aten.div_.Tensor: "div",
}  # fmt: skip
#: The same elements in the same order, in another shape.
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.detach.default,
         aten.alias.default, aten.squeeze.dim, aten.squeeze.default}  # fmt: skip
FILLED = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
NORMAL = (aten.randn.default, aten.randn.generator)
IMMUTABLE = (int, float, bool, str, type(None), torch.Size)


class _Unknown(Exception):
    """What no program computes."""


class Node(NamedTuple):
    """A value of a step: a given tensor ("given"), noise ("randn"), what an instruction gives."""

    name: str
    operands: tuple[Any, ...]  # nodes by number, then numbers or a dtype; a call of randn
    tensor: Tensor


def _is_one_generator(drawn: Any, given: Any) -> bool:
    """Whether it is the given one that has been drawn from; each call of it has another object."""
    if drawn is None or given is None:
        return drawn is given
    return torch.equal(drawn.get_state(), given.get_state())


class Watch(TorchDispatchMode):
    """Notes what is computed of `given`, the sample being given[1]."""

    def __init__(self, given: list[Tensor], generator: Any) -> None:
        super().__init__()
        self.generator, self.size = generator, given[1].numel()
        self.nodes: list[Node] = []
        # By the address of a tensor's elements, which its views share, and what is written to it.
        # No address comes twice: nodes keep their tensors.
        self.node_at: dict[int, int] = {}
        self.filled: dict[int, tuple[float, Tensor]] = {}  # with one number
        self.known = True
        for x in given:
            number = self.at(x)
            if number is None:
                self.add("given", (), x, x.dtype)
            else:  # a second time, or another view of it
                self.known &= self.nodes[number].tensor is x
                self.nodes.append(Node("given", (), x))

    def add(self, name: str, operands: tuple, out: Tensor, dtype: torch.dtype) -> None:
        if out.numel() != self.size or out.dtype != dtype:
            raise _Unknown
        self.node_at[out.data_ptr()] = len(self.nodes)
        self.filled.pop(out.data_ptr(), None)
        self.nodes.append(Node(name, operands, out))

    def at(self, x: Any) -> int | None:
        return self.node_at.get(x.data_ptr()) if isinstance(x, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference_mode these come as they are called
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        if self.known:
            try:
                self.see(func, args, kwargs, out)
            except _Unknown:
                self.known = False
        return out

    def see(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func in NORMAL:
            if not _is_one_generator(kwargs.get("generator"), self.generator):
                raise _Unknown
            return self.add("randn", (func, args, kwargs), out, out.dtype)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        addresses = {x.data_ptr() for x in tensors}
        if not addresses & {*self.node_at, *self.filled}:  # numbers of the schedule
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise _Unknown
            return None
        if func._schema.is_mutable:
            number = self.at(args[0])
            if number is not None and self.nodes[number].name == "given":
                raise _Unknown
        if func in PAIRS and kwargs.get("alpha", 1) == 1:
            return self.pair(PAIRS[func], args[0], args[1], out)
        if func in FILLED:
            self.filled[out.data_ptr()] = FILLED[func], out
            return None
        if func in VIEWS or self.keeps_order(func, args):
            return None
        x = tensors[0]
        number = self.at(x)
        if number is None:
            raise _Unknown
        if (func is aten.stack.default and len(tensors) == 1) or (
            func is aten._to_copy.default and out.device == x.device
        ):
            self.add("to", (number, out.dtype), out, out.dtype)
        elif func is aten.neg.default:
            self.add("mul s", (number, -1.0), out, x.dtype)
        elif func is aten.clamp.default:
            given = (*args[1:], None, None)[:2]
            low, high = (
                sign * inf if v is None else float(v)
                for v, sign in zip(given, (-1, 1), strict=True)
            )
            self.add("clamp", (number, low, high), out, x.dtype)
        else:
            raise _Unknown
        return None

    def keeps_order(self, func: Any, args: tuple) -> bool:
        """Whether it permutes dimensions such that only those of size 1 change places."""
        if func is not aten.permute.default:
            return False
        dims = [d % args[0].dim() for d in args[1]]
        dims = [d for d in dims if args[0].shape[d] != 1]
        return dims == sorted(dims)

    def pair(self, name: str, x: Any, y: Any, out: Tensor) -> None:
        a, b = self.at(x), self.at(y)
        if a is not None and b is not None:
            return self.add(name, (a, b), out, torch.promote_types(x.dtype, y.dtype))
        if a is not None:
            return self.add(f"{name} s", (a, self.number(y, x.dtype)), out, x.dtype)
        if b is None or name == "div":
            raise _Unknown
        # A number on the left is rounded to the dtype of the result, also where one on the right
        # would not be.
        first = torch.tensor(self.number(x, y.dtype)).to(y.dtype).item()
        if name == "sub":
            self.nodes.append(Node("mul s", (b, -1.0), y))
            name, b = "add", len(self.nodes) - 1
        return self.add(f"{name} s", (b, first), out, y.dtype)

    def number(self, value: Any, dtype: torch.dtype) -> float:
        if isinstance(value, Tensor):
            if value.data_ptr() in self.filled and value.dtype == dtype:
                return self.filled[value.data_ptr()][0]
            if value.numel() != 1 or not value.is_cpu:
                raise _Unknown
            value = value.item()
        if not isinstance(value, int | float):
            raise _Unknown
        return float(value)


# ---- what is had again --------------------------------------------------------------------------

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
                raise _Unknown
            return LITERAL, value
        if value is self.timestep:
            return TIMESTEP, None
        number = self.watch.at(value)
        if number is None:
            if value.dim() > 0:  # a number of the schedule may be had by many, and no more
                raise _Unknown
            return LITERAL, value
        if value.shape != self.shape:
            raise _Unknown
        if number in self.leaves:
            if self.watch.nodes[number].tensor.stride() != value.stride():
                raise _Unknown
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
        raise _Unknown
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
            raise _Unknown
        values = planner.source(
            list(result) if names is None else [getattr(result, name) for name in names]
        )
        reads, code, scalars = planner.program()
        nodes = watch.nodes
        draws = [nodes[i].operands for i in planner.leaves if nodes[i].name == "randn"]
        plan = Plan(draws, reads, code, scalars, changes, type(result), names, values)
        return result, plan if _proves(plan, planner) else None
    except _Unknown:
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
    return all(
        a.stride() == nodes[n].tensor.stride()
        and torch.allclose(a, nodes[n].tensor, rtol=0, atol=0, equal_nan=True)
        for a, n in zip(got, planner.results, strict=True)
    )

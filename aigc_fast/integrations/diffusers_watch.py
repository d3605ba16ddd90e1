"""A step of a scheduler of diffusers, watched: the elementwise operators it consists of."""

import functools
from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Unknown(Exception):
    """What no program computes."""


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@functools.cache
def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the arguments of an operator, and in lists among them."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


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
            raise Unknown
        self.node_at[out.data_ptr()] = len(self.nodes)
        self.filled.pop(out.data_ptr(), None)
        self.nodes.append(Node(name, operands, out))

    def at(self, x: Any) -> int | None:
        return self.node_at.get(x.data_ptr()) if isinstance(x, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # elsewhere its parts come by themselves
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.known:
            try:
                self.see(func, args, kwargs, out)
            except Unknown:
                self.known = False
        return out

    def see(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func in NORMAL:
            if not _is_one_generator(kwargs.get("generator"), self.generator):
                raise Unknown
            return self.add("randn", (func, args, kwargs), out, out.dtype)
        tensors = _tensors(args) + _tensors(kwargs.values()) if kwargs else _tensors(args)
        if not any(x.data_ptr() in self.node_at or x.data_ptr() in self.filled for x in tensors):
            if _is_random(func):
                raise Unknown
            return None  # numbers of the schedule
        if func._schema.is_mutable:
            number = self.at(args[0])
            if number is not None and self.nodes[number].name == "given":
                raise Unknown
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
            raise Unknown
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
            raise Unknown
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
            raise Unknown
        # A number on the left is rounded to the dtype of the result, also where one on the right
        # would not be.
        first = torch.tensor(self.number(x, y.dtype), dtype=torch.float64).to(y.dtype).item()
        if name == "sub":
            self.nodes.append(Node("mul s", (b, -1.0), y))
            name, b = "add", len(self.nodes) - 1
        return self.add(f"{name} s", (b, first), out, y.dtype)

    def number(self, value: Any, dtype: torch.dtype) -> float:
        if isinstance(value, Tensor):
            if value.data_ptr() in self.filled and value.dtype == dtype:
                return self.filled[value.data_ptr()][0]
            if value.numel() != 1 or not value.is_cpu:
                raise Unknown
            value = value.item()
        if not isinstance(value, int | float):
            raise Unknown
        return float(value)

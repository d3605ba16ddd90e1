"""What is known of the functions of aigc_fast.ops: which implementations they have and take."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from aigc_fast.ops import _registry
from aigc_fast.ops._checks import name_of
from aigc_fast.ops._public import PUBLIC, TORCH, made_of
from aigc_fast.ops._registry import BACKENDS, FLOATS, OPS, Op


class Explanation(NamedTuple):
    """What `explain` found: the function, the implementation its call takes, and why."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason})"


class _Explained(BaseException):  # which nothing on the way handles
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation the call function(*args, **kwargs) would take, and why.

    function: one of aigc_fast.ops, or any function that calls one. Then the first operator called
              is explained, by its own name.

    For a function made of several operators (see `list_ops`) the first one decides. A function that
    runs torch's operators only has the implementation "torch". Nothing is computed, but arguments
    are checked.

    Raises TypeError for what is no such function, RuntimeError within a block of `backend` that
    the call could not obey, and what the call itself raises for its arguments.
    """
    if not callable(function):
        raise TypeError(
            f"function must be one of aigc_fast.ops itself, such as ops.rms_norm, got {function!r}"
        )
    name = getattr(function, "__name__", "")
    public = PUBLIC.get(name) is function
    shapes_alone: contextlib.AbstractContextManager = contextlib.nullcontext()
    if public and TORCH in made_of(name):  # what torch computes is not computed then
        shapes_alone = fake = FakeTensorMode()
        args, kwargs = tree_map_only(torch.Tensor, fake.from_tensor, (args, kwargs))
    try:
        with _registry.explaining(_explained), shapes_alone:
            function(*args, **kwargs)
    except _Explained as found:
        explanation = found.explanation
        if not public or explanation.op == name:
            return explanation
        reason = f"{explanation.reason}, as operator {explanation.op}"
        return explanation._replace(op=name, reason=reason)
    if public:
        return Explanation(name, TORCH, "it is made of torch's own operators")
    raise TypeError(f"function must be one of aigc_fast.ops, got {function!r}")


def _explained(op: Op, args: tuple) -> None:
    op.check(*args)
    forced = _registry.forced()
    if forced is not None:
        op.check_forced(forced, args)
    chosen = op.choose(*args) if forced is None else (forced, "backend forces it")
    raise _Explained(Explanation(op.name, *chosen))


def list_ops() -> list[dict[str, Any]]:
    """A row for every function of aigc_fast.ops, with these keys:

    op:              its name.
    made_of:         the library's operators that it calls, and "torch" where torch computes too.
    implementations: those that this machine has for all of these operators; ["torch"] where torch
                     computes everything.
    dtypes:          names of the dtypes that compiled kernels take.
    """
    return [_row(name) for name in sorted(PUBLIC)]


def _row(name: str) -> dict[str, Any]:
    parts = made_of(name)
    own = [OPS[part] for part in parts if part != TORCH]
    # torch computes what an operator of several does not take.
    dtypes = FLOATS if TORCH in parts else [t for t in FLOATS if all(t in op.dtypes for op in own)]
    everywhere = [kind for kind in BACKENDS if all(op.has(kind) for op in own)]
    return {
        "op": name,
        "made_of": list(parts),
        "implementations": everywhere if own else [TORCH],
        "dtypes": [name_of(t) for t in dtypes],
    }

"""Products of groups of rows, each with a weight of its own: the experts of a mixture."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast.ops._autocast import under_autocast
from aigc_fast.ops._autograd import OpFunction, asked_for, transforming, wanted
from aigc_fast.ops._checks import check_device, check_tensor, plain_on_cpu
from aigc_fast.ops._groups import groups
from aigc_fast.ops._registry import FLOATS, define, forced
from aigc_fast.ops.linear import DTYPES, lags, linear


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y[i] = weight[g] @ x[i] for the rows i of group g, ends[g - 1] <= i < ends[g].

    x:      (rows, in_features), float64, float32, bfloat16 or float16.
    weight: (groups, out_features, in_features), in the dtype of x but under autocast.
    ends:   int32 (groups,), where the rows of each group end: they do not fall, and the last is
            `rows`. A group may have none.

    Returns (rows, out_features). Differentiable as often as one likes; the gradients of all weights
    are one tensor, written once.

    Where `linear` has products of its own, one operator: a few rows of a group read its weight
    where it is, more multiply packed blocks of it. Elsewhere on a CPU it is `linear` group by
    group; on a GPU torch's `grouped_mm`, which does not wait for `ends` (float64: group by group).

    Raises TypeError or ValueError for a wrong dtype, shape or device, and on a CPU for ends that
    fall or end elsewhere than at `rows`.
    """
    device = x.device.type
    if under_autocast(device) and x.dtype in DTYPES and weight.dtype in DTYPES:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return grouped_linear(x.to(dtype), weight.to(dtype), ends)
    compiling = torch.compiler.is_compiling()
    if compiling and _has_grouped_mm(x, weight) and x.dtype == torch.bfloat16:
        return _grouped_mm(x, weight, ends)
    if not compiling and not _is_ours(x, weight):
        _check(x, weight, ends)
        return _by_torch(x, weight, ends)
    if wanted(x, weight):
        return _GroupedLinear.call(x, weight, ends)
    return _product(x, weight, ends)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return (
        lags(x.dtype)
        and plain_on_cpu((x, weight), (x.dtype,))
        and not transforming()
        and forced() not in ("triton", "cuda")  # which have none, so that it is torch's there too
    )


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own operator takes the call: sizes of whole 16 bytes."""
    sizes = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return x.dtype in DTYPES and sizes


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # Its rows begin at whole 16 bytes, which views need not.
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)


def _by_torch(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """By torch's operators, and with their derivatives."""
    if x.is_meta or isinstance(x, FakeTensor):  # where ends has no values
        return x.new_empty(len(x), weight.shape[1])
    if x.is_cuda and _has_grouped_mm(x, weight):
        return _grouped_mm(x, weight, ends)
    # Taken one by one, the weights would each have a gradient as large as all of them.
    weights = weight.unbind() if wanted(weight) else weight
    parts = [linear(rows, weights[g]) for g, rows in groups(x, ends)]
    return torch.cat(parts) if parts else F.linear(x, weight[0])


def _outer_by_torch(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    if x.is_meta or isinstance(x, FakeTensor):
        return x.new_empty(len(ends), dy.shape[1], x.shape[1])
    out = x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    for (g, a), (_, b) in zip(groups(dy, ends), groups(x, ends), strict=True):
        out[g] = linear(a.t(), b.t())
    return out


def _check(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    check_tensor("x", x, dtypes=FLOATS, ndim=2)
    check_tensor("weight", weight, ndim=3, like=("x", x))
    if weight.shape[2] != x.shape[1] or len(weight) == 0:
        raise ValueError(
            f"weight must have shape (groups > 0, out_features, {x.shape[1]}), "
            f"got {tuple(weight.shape)}"
        )
    check_tensor("ends", ends, dtypes=(torch.int32,), shape=weight.shape[:1])
    check_device("ends", ends, ("x", x))


def _check_outer(dy: Tensor, x: Tensor, ends: Tensor) -> None:
    check_tensor("x", x, ndim=2)
    check_tensor("grad_output", dy, ndim=2, like=("x", x))
    check_tensor("ends", ends, dtypes=(torch.int32,), ndim=1)


_product = define(
    "grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    _by_torch,
    _check,
    stem=None,
    dtypes=DTYPES,
)
_outer = define(
    "grouped_outer(Tensor grad_output, Tensor x, Tensor ends) -> Tensor",
    _outer_by_torch,
    _check_outer,
    stem=None,
    dtypes=DTYPES,
)


class _GroupedLinear(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x, weight, ends) = grads, ctx.saved_tensors
        by_x, by_weight, _ = asked_for(ctx)
        return (
            grouped_linear(dy, weight.transpose(1, 2), ends) if by_x else None,
            _GroupedOuter.call(dy, x, ends) if by_weight else None,
            None,
        )


class _GroupedOuter(OpFunction):
    """dy[i] times x[i], summed over the rows of each group: the gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(dy, x, ends)
        return _outer(dy, x, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dw,), (dy, x, ends) = grads, ctx.saved_tensors
        by_dy, by_x, _ = asked_for(ctx)
        return (
            grouped_linear(x, dw, ends) if by_dy else None,
            grouped_linear(dy, dw.transpose(1, 2), ends) if by_x else None,
            None,
        )

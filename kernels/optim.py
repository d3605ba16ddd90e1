"""Adam with clipping, averaged weights and a guard, for all tensors of a model in one launch.

The kernels get the tensors' addresses in a table, a row for each tensor, and a tensor's number for
each block of its elements, so that a program knows what its block is of.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import expm1, fp32
from .memory_order import dense, in_order_of
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_square_sums": (32, 1024), "_count": (32, 0), "_adam": (72, 0)}

_BLOCK = 1024

# columns of the table: addresses, then the number of elements and the tensor's first block
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _STEP, _AVERAGE, _SIZE, _FIRST = (
    tl.constexpr(i) for i in range(8)
)
_COLUMNS = tl.constexpr(8)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _block(table_ptr, owner_ptr, BLOCK: tl.constexpr):
    """Row of the table, first element of this program's block, and how many there are from it."""
    row = table_ptr + tl.load(owner_ptr + tl.program_id(0)).to(tl.int64) * _COLUMNS
    start = (tl.program_id(0) - tl.load(row + _FIRST)) * BLOCK
    return row, start, tl.load(row + _SIZE) - start


@triton.jit
def _square_sums(
    table_ptr, owner_ptr, parts_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    row, start, left = _block(table_ptr, owner_ptr, BLOCK)
    at = _pointer(row, _PARAM, TYPE, ALIGNED) + start + tl.arange(0, BLOCK)
    # A block that is whole needs no mask, with which loads of unknown length are narrow.
    if left >= BLOCK:
        g = tl.load(at).to(tl.float32)
    else:
        g = tl.load(at, tl.arange(0, BLOCK) < left, 0.0).to(tl.float32)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def _is_finite(norm_ptr):
    if norm_ptr is None:
        return True
    else:
        return tl.abs(tl.load(norm_ptr).to(tl.float32)) < float("inf")


@triton.jit
def _count(table_ptr, norm_ptr, skipped_ptr, TYPE: tl.constexpr):
    """One more step of each tensor, or one more that was skipped: before any program of _adam."""
    pid, taken = tl.program_id(0), _is_finite(norm_ptr)
    step = _pointer(table_ptr + pid * _COLUMNS, _STEP, TYPE, False)
    tl.store(step, (tl.load(step).to(tl.float32) + 1).to(TYPE), taken)
    if skipped_ptr is not None and norm_ptr is not None:
        more = tl.where(taken, 0.0, 1.0)
        count = tl.load(skipped_ptr).to(tl.float32) + more
        tl.store(skipped_ptr, count.to(skipped_ptr.dtype.element_ty), pid == 0)


@triton.jit
def _load(ptr, left, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    if MASKED:
        return tl.load(ptr, tl.arange(0, BLOCK) < left, 0.0).to(tl.float32)
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def _store(ptr, v, left, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    if MASKED:
        tl.store(ptr, v.to(ptr.dtype.element_ty), tl.arange(0, BLOCK) < left)
    else:
        tl.store(ptr, v.to(ptr.dtype.element_ty))


@triton.jit
def _update(
    row, start, left, clip, size, correction, toward1, beta2, toward2, eps, keep, added,
    average_toward, TYPE: tl.constexpr, ALIGNED: tl.constexpr, AVERAGED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    param = _pointer(row, _PARAM, TYPE, ALIGNED) + at
    exp_avg = _pointer(row, _EXP_AVG, TYPE, ALIGNED) + at
    exp_avg_sq = _pointer(row, _EXP_AVG_SQ, TYPE, ALIGNED) + at
    p = _load(param, left, MASKED, BLOCK)
    m = _load(exp_avg, left, MASKED, BLOCK)
    v = _load(exp_avg_sq, left, MASKED, BLOCK)
    g = _load(_pointer(row, _GRAD, TYPE, ALIGNED) + at, left, MASKED, BLOCK) * clip + added * p
    m += toward1 * (g - m)
    v = beta2 * v + toward2 * g * g
    p = keep * p - size * m / (tl.sqrt(v) * correction + eps)
    _store(param, p, left, MASKED, BLOCK)
    _store(exp_avg, m, left, MASKED, BLOCK)
    _store(exp_avg_sq, v, left, MASKED, BLOCK)
    if AVERAGED:
        average = _pointer(row, _AVERAGE, TYPE, ALIGNED) + at
        a = _load(average, left, MASKED, BLOCK)
        _store(average, a + average_toward * (p - a), left, MASKED, BLOCK)


@triton.jit
def _adam(
    table_ptr, owner_ptr, norm_ptr, lr, toward1, log_beta1, beta2, toward2, log_beta2, eps, keep,
    added, average_toward, max_norm, rates_ptr, decay, TYPE: tl.constexpr,
    STEP_TYPE: tl.constexpr, ALIGNED: tl.constexpr, AVERAGED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, left = _block(table_ptr, owner_ptr, BLOCK)
    if rates_ptr is not None:  # in fp64 what the host would compute
        lr = tl.load(rates_ptr).to(tl.float64)
        keep = 1 - lr * decay
        average_toward = 1 - tl.load(rates_ptr + 1).to(tl.float64)
    step = tl.load(_pointer(row, _STEP, STEP_TYPE, False)).to(tl.float32)
    size = fp32(lr) / -expm1(step * fp32(log_beta1))  # 1 - beta^step without cancellation
    correction = tl.rsqrt(-expm1(step * fp32(log_beta2)))
    clip = 1.0
    if norm_ptr is not None:
        clip = tl.minimum(fp32(max_norm) / (tl.load(norm_ptr).to(tl.float32) + 1e-6), 1.0)
    toward1, beta2, toward2, eps = fp32(toward1), fp32(beta2), fp32(toward2), fp32(eps)
    keep, added, average_toward = fp32(keep), fp32(added), fp32(average_toward)
    if _is_finite(norm_ptr):
        # A block that is whole needs no mask, with which loads of unknown length are narrow.
        if left >= BLOCK:
            _update(row, start, left, clip, size, correction, toward1, beta2, toward2, eps, keep,
                    added, average_toward, TYPE, ALIGNED, AVERAGED, False, BLOCK)  # fmt: skip
        else:
            _update(row, start, left, clip, size, correction, toward1, beta2, toward2, eps, keep,
                    added, average_toward, TYPE, ALIGNED, AVERAGED, True, BLOCK)  # fmt: skip


# ---- launchers ------------------------------------------------------------------------------


class _Table:
    """Lists of tensors as the kernels read them; each column has one tensor a row."""

    def __init__(self, columns: dict[tl.constexpr, list[Tensor]]) -> None:
        first = next(iter(columns.values()))
        addresses = tuple(
            (column.value, tuple(t.data_ptr() for t in tensors))
            for column, tensors in columns.items()
        )
        made = _table(addresses, tuple(t.numel() for t in first), first[0].device)
        if made.rows.is_cuda and torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(made)
        self.blocks, self.owners, self.rows = made.blocks, made.owners, made.rows
        data = [a for column, at in addresses if column != _STEP.value for a in at]
        self.aligned = all(a % 16 == 0 for a in data)


class _Made(NamedTuple):
    blocks: int
    owners: Tensor
    rows: Tensor
    on_host: Tensor


#: CUDA graphs read these again at every replay, so they are never freed
_CAPTURED: list[_Made] = []


# Parameters stay where they are, and so do gradients that are zeroed in place: their table is made
# once, and not while a CUDA graph is captured, which can hold no allocation on the host.
@functools.lru_cache(maxsize=16)
def _table(
    addresses: tuple[tuple[int, tuple[int, ...]], ...], sizes: tuple[int, ...], device: torch.device
) -> _Made:
    counts = [triton.cdiv(size, _BLOCK) for size in sizes]
    rows = torch.zeros(len(sizes), _COLUMNS.value, dtype=torch.int64)
    rows[:, _SIZE.value] = torch.tensor(sizes)
    rows[:, _FIRST.value] = torch.tensor([0, *counts]).cumsum(0)[:-1]
    for column, at in addresses:
        rows[:, column] = torch.tensor(at)
    if device.type == "cuda":  # a copy that waits for nothing
        rows = rows.pin_memory()
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    owners = owners.to(device, torch.int32, non_blocking=True)
    return _Made(sum(counts), owners, rows.to(device, non_blocking=True), rows)


def gradient_norm(grads: list[Tensor], loss: Tensor | None = None) -> Tensor:
    table = _Table({_PARAM: [dense(g) for g in grads]})
    parts = table.rows.new_empty(table.blocks, dtype=torch.float32)
    if table.blocks:
        _square_sums[(table.blocks,)](
            table.rows, table.owners, parts, TYPE=_TYPES[grads[0].dtype], ALIGNED=table.aligned,
            BLOCK=_BLOCK,
        )  # fmt: skip
    norm = parts.sum().sqrt()
    return norm if loss is None else torch.where(loss.isfinite(), norm, torch.nan)


def adam_step(
    params, grads, exp_avgs, exp_avg_sqs, steps, averages, norm, skipped, lr, beta1, beta2, eps,
    weight_decay, decoupled, ema_decay, max_norm, rates=None,
) -> None:  # fmt: skip
    ours = [dense(p) for p in params]
    lists = {_PARAM: ours, _GRAD: grads, _EXP_AVG: exp_avgs, _EXP_AVG_SQ: exp_avg_sqs}
    if averages:
        lists[_AVERAGE] = averages
    laid_out = {
        column: [in_order_of(t, p) for t, p in zip(tensors, ours, strict=True)]
        for column, tensors in lists.items()
    }
    table = _Table({**laid_out, _STEP: steps})
    step_type = _TYPES[steps[0].dtype]
    _count[(len(params),)](table.rows, norm, skipped, TYPE=step_type)
    if table.blocks:
        _adam[(table.blocks,)](
            table.rows, table.owners, norm, lr, 1 - beta1, _log(beta1), beta2, 1 - beta2,
            _log(beta2), eps, 1 - lr * weight_decay if decoupled else 1.0,
            0.0 if decoupled else weight_decay, 1 - ema_decay,
            math.inf if max_norm is None else max_norm, *contiguous(rates),
            weight_decay if decoupled else 0.0, TYPE=_TYPES[params[0].dtype],
            STEP_TYPE=step_type, ALIGNED=table.aligned, AVERAGED=bool(averages), BLOCK=_BLOCK,
        )  # fmt: skip
    for column, tensors in {**lists, _PARAM: params}.items():
        for theirs, copy in zip(tensors, laid_out[column], strict=True):
            if column is not _GRAD and copy is not theirs:
                theirs.copy_(copy)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf

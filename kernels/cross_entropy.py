"""The cross-entropy of rows of logits, and its gradient.

Forward: one program takes a row, once, block by block, and brings its sum of exponentials down
whenever a larger logit comes. Backward: one program takes a block of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32, tanh
from .rows import as_rows

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (64, 1024), "_backward": (80, 0)}

_BLOCK = 4096


@triton.jit
def _logit(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * tanh(x / softcap)
    else:
        return x


@triton.jit
def _forward(
    x_ptr, target_ptr, loss_ptr, lse_ptr, classes, stride, ignore_index, smoothing, softcap, z_loss,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, HAS_Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    softcap = fp32(softcap)
    infinity = float("inf")
    top = fp32(-infinity)
    total = fp32(0.0)
    logits = fp32(0.0)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _logit(tl.load(x_ptr + at, at < classes, 0.0).to(tl.float32), softcap, CAPPED)
        if SMOOTH:
            logits += tl.sum(x, 0)
        x = tl.where(at < classes, x, -infinity)
        higher = tl.maximum(top, tl.max(x, 0))
        # Infinite differences would be NaN.
        shift = tl.where(tl.abs(higher) == infinity, 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = higher
    lse = tl.where(tl.abs(top) == infinity, 0.0, top) + tl.log(total)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < classes)
    chosen = tl.load(x_ptr + target, known, float("nan")).to(tl.float32)
    chosen = _logit(chosen, softcap, CAPPED)
    loss = lse - chosen
    if SMOOTH:
        loss += fp32(smoothing) * (chosen - logits / classes)
    if HAS_Z:
        loss += fp32(z_loss) * lse * lse
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lse_ptr + row, lse)


@triton.jit
def _backward(
    grad_ptr, x_ptr, target_ptr, lse_ptr, out_ptr, classes, stride, grad_stride, ignore_index,
    smoothing, softcap, z_loss, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    lse = tl.load(lse_ptr + row)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < classes)
    grad = tl.where(known, grad, float("nan"))
    smoothing, softcap = fp32(smoothing), fp32(softcap)
    x = tl.load(x_ptr + row * stride + at, at < classes, 0.0).to(tl.float32)
    logit = _logit(x, softcap, CAPPED)
    out = tl.exp(logit - lse) * (1.0 + 2.0 * fp32(z_loss) * lse) - smoothing / classes
    out = grad * tl.where(at == target, out - (1.0 - smoothing), out)
    if CAPPED:
        share = logit / softcap
        out *= 1.0 - share * share
    out = tl.where(target == ignore_index, 0.0, out)
    tl.store(out_ptr + row * classes + at, out.to(out_ptr.dtype.element_ty), at < classes)


def cross_entropy(
    x: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    loss = torch.empty(target.shape, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    if len(rows):
        _forward[(len(rows),)](
            rows, target.contiguous(), loss, lse, rows.shape[1], rows.stride(0), ignore_index,
            smoothing, softcap, z_loss, CAPPED=softcap != 0, SMOOTH=smoothing != 0,
            HAS_Z=z_loss != 0, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return loss, lse


def cross_entropy_backward(grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, *options: float) -> Tensor:  # noqa: E501  # fmt: skip
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _write_gradient(grad, x, target, lse, out, *options)
    return out


def cross_entropy_backward_(grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, *options: float) -> None:  # noqa: E501  # fmt: skip
    _write_gradient(grad, x, target, lse, x, *options)


def _write_gradient(
    grad: Tensor, x: Tensor, target: Tensor, lse: Tensor, out: Tensor, ignore_index: int,
    smoothing: float, softcap: float, z_loss: float,
) -> None:  # fmt: skip
    rows, grad = as_rows(x), grad.reshape(-1)
    if len(rows) == 0:
        return
    grid = len(rows), triton.cdiv(rows.shape[1], _BLOCK)
    _backward[grid](
        grad, rows, target.contiguous(), lse.contiguous(), out, rows.shape[1], rows.stride(0),
        grad.stride(0), ignore_index, smoothing, softcap, z_loss, CAPPED=softcap != 0,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip

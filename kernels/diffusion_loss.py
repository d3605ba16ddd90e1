"""The mean over samples of weight * mean((model_output - target)^2), and its gradient.

target = alpha * first - sigma * second; without a second it is first, without scales they are 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .optional import contiguous
from .per_sample import BLOCK, Rows, locate, store
from .rows import load

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (64, 1024), "_backward": (64, 0)}


@triton.jit
def _error(
    output_ptr, first_ptr, second_ptr, alpha_ptr, sigma_ptr, row, at, mask, output_stride,
    first_stride, second_stride,
):  # fmt: skip
    target = load(first_ptr, row, first_stride, at, mask)
    if second_ptr is not None:
        second = load(second_ptr, row, second_stride, at, mask)
        if alpha_ptr is not None:
            target *= tl.load(alpha_ptr + row).to(tl.float32)
            second *= tl.load(sigma_ptr + row).to(tl.float32)
        target -= second
    return load(output_ptr, row, output_stride, at, mask) - target


@triton.jit
def _forward(
    out_ptr, output_ptr, first_ptr, second_ptr, alpha_ptr, sigma_ptr, weights_ptr, inner, share,
    output_stride, first_stride, second_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    error = _error(
        output_ptr, first_ptr, second_ptr, alpha_ptr, sigma_ptr, row, at, mask, output_stride,
        first_stride, second_stride,
    )  # fmt: skip
    scale = fp32(share)
    if weights_ptr is not None:
        scale *= tl.load(weights_ptr + row).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), scale * tl.sum(error * error, 0))


@triton.jit
def _backward(
    grad_ptr, to_output_ptr, output_ptr, first_ptr, second_ptr, alpha_ptr, sigma_ptr, weights_ptr,
    inner, share, output_stride, first_stride, second_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    error = _error(
        output_ptr, first_ptr, second_ptr, alpha_ptr, sigma_ptr, row, at, mask, output_stride,
        first_stride, second_stride,
    )  # fmt: skip
    scale = 2 * fp32(share) * tl.load(grad_ptr).to(tl.float32)
    if weights_ptr is not None:
        scale *= tl.load(weights_ptr + row).to(tl.float32)
    store(to_output_ptr, row, inner, at, mask, error * scale)


class _Call:
    """The arguments that both kernels share."""

    def __init__(
        self,
        model_output: Tensor,
        first: Tensor,
        second: Tensor | None,
        alpha: Tensor | None,
        sigma: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        self.rows = rows = Rows(model_output)
        tensors = [rows.arrange(x) for x in (model_output, first, second)]
        scales = contiguous(alpha, sigma, weights)
        strides = rows.strides(*tensors, per_sample=True)
        self.args = (*tensors, *scales, rows.inner, 1 / rows.size, *strides)


def diffusion_loss(model_output: Tensor, *args: Tensor | None) -> Tensor:
    call = _Call(model_output, *args)
    (programs,) = call.rows.grid
    parts = model_output.new_empty(programs, dtype=torch.float32)
    _forward[(programs,)](parts, *call.args, BLOCK=BLOCK)
    return parts.view(()) if programs == 1 else parts.sum()


def diffusion_loss_backward(grad: Tensor, model_output: Tensor, *args: Tensor | None) -> Tensor:
    call = _Call(model_output, *args)
    to_output = call.rows.result()
    _backward[call.rows.grid](grad, to_output, *call.args, BLOCK=BLOCK)
    return call.rows.finish([to_output])[0]

"""The two terms of a VAE's bound: a draw of a diagonal Gaussian with its divergence from the
standard normal, and the likelihood of the data; and their gradients.

A program leaves the sum of its block; those of a sample are added by torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import exp_tail, softplus
from .optional import contiguous
from .per_sample import BLOCK, Rows, locate, store
from .rows import load

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_sample": (72, 2048),
    "_sample_backward": (80, 0),
    "_loss": (64, 1024),
    "_loss_backward": (64, 0),
}

# bounds of the log-variance, and numbers of the operator's schema
_LOWEST, _HIGHEST = tl.constexpr(-30.0), tl.constexpr(20.0)
_BERNOULLI, _GAUSSIAN = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _clamped(x):
    keep: tl.constexpr = tl.PropagateNan.ALL
    return tl.maximum(tl.minimum(x, _HIGHEST, propagate_nan=keep), _LOWEST, propagate_nan=keep)


@triton.jit
def _sample(
    mean_ptr, log_variance_ptr, noise_ptr, sample_ptr, sums_ptr, inner, mean_stride,
    log_variance_stride, noise_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    mean = load(mean_ptr, row, mean_stride, at, mask)
    x = _clamped(load(log_variance_ptr, row, log_variance_stride, at, mask))
    variance = tl.exp(x)
    # Beyond the end of a row both are zero, and so is their term.
    less_line = tl.where(tl.abs(x) < 0.34, exp_tail(x), variance - 1.0 - x)
    tl.store(sums_ptr + tl.program_id(0), 0.5 * tl.sum(mean * mean + less_line, 0))
    if noise_ptr is not None:
        mean += tl.sqrt(variance) * load(noise_ptr, row, noise_stride, at, mask)
    store(sample_ptr, row, inner, at, mask, mean)


@triton.jit
def _sample_backward(
    grad_ptr, grad_kl_ptr, mean_ptr, log_variance_ptr, noise_ptr, to_mean_ptr, to_log_variance_ptr,
    to_noise_ptr, inner, grad_stride, mean_stride, log_variance_stride, noise_stride, out_stride,
    OF_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    raw = load(log_variance_ptr, row, log_variance_stride, at, mask)
    x = _clamped(raw)
    variance = tl.exp(x)
    to_mean = tl.zeros((BLOCK,), tl.float32)
    to_log_variance = tl.zeros((BLOCK,), tl.float32)
    if grad_kl_ptr is not None:
        scale = tl.load(grad_kl_ptr + row)
        to_mean = scale * load(mean_ptr, row, mean_stride, at, mask)
        less_one = tl.where(tl.abs(x) < 0.34, exp_tail(x) + x, variance - 1.0)
        to_log_variance = 0.5 * scale * less_one
    if grad_ptr is not None:
        grad = load(grad_ptr, row, grad_stride, at, mask)
        to_mean += grad
        if noise_ptr is not None:
            grad *= tl.sqrt(variance)
            to_log_variance += 0.5 * grad * load(noise_ptr, row, noise_stride, at, mask)
            if OF_NOISE:
                store(to_noise_ptr, row, inner, at, mask, grad)
    to_log_variance = tl.where((raw >= _LOWEST) & (raw <= _HIGHEST), to_log_variance, 0.0)
    store(to_mean_ptr, row, out_stride, at, mask, to_mean)
    store(to_log_variance_ptr, row, out_stride, at, mask, to_log_variance)


@triton.jit
def _loss(
    output_ptr, target_ptr, sums_ptr, inner, output_stride, target_stride, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    x = load(output_ptr, row, output_stride, at, mask)
    t = load(target_ptr, row, target_stride, at, mask)
    if KIND == _BERNOULLI:
        # softplus(x) - t x, where a large x meets t = 1 without cancelling
        value = x * (tl.where(x > 0, 1.0, 0.0) - t) + softplus(-tl.abs(x))
        value = tl.where(mask, value, 0.0)
    elif KIND == _GAUSSIAN:
        value = 0.5 * (x - t) * (x - t)
    else:
        value = tl.abs(x - t)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(value, 0))


@triton.jit
def _loss_backward(
    grad_ptr, output_ptr, target_ptr, to_output_ptr, inner, output_stride, target_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    x = load(output_ptr, row, output_stride, at, mask)
    t = load(target_ptr, row, target_stride, at, mask)
    if KIND == _BERNOULLI:
        slope = tl.sigmoid(x) - t
    elif KIND == _GAUSSIAN:
        slope = x - t
    else:
        slope = tl.where(x > t, 1.0, 0.0) - tl.where(x < t, 1.0, 0.0)
    store(to_output_ptr, row, inner, at, mask, tl.load(grad_ptr + row) * slope)


def _sums(rows: Rows, like: Tensor) -> Tensor:
    """Room for the sum of each program."""
    return like.new_empty(rows.batch, triton.cdiv(rows.inner, BLOCK), dtype=torch.float32)


def sample_gaussian(parameters: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    halves = parameters.chunk(2, 1)
    rows = Rows(halves[0])
    tensors = [rows.arrange(x) for x in (*halves, noise)]
    strides = rows.strides(*tensors, per_sample=True)
    sample, sums = rows.result(), _sums(rows, parameters)
    if rows.size:
        _sample[rows.grid](*tensors, sample, sums, rows.inner, *strides, BLOCK=BLOCK)
    return rows.finish([sample])[0], sums.sum(1)


def sample_gaussian_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    parameters: Tensor,
    noise: Tensor | None,
    of_noise: bool,
) -> tuple[Tensor, Tensor]:
    halves = parameters.chunk(2, 1)
    rows = Rows(halves[0])
    grad, *tensors = (rows.arrange(x) for x in (grad_sample, *halves, noise))
    strides = rows.strides(grad, *tensors, per_sample=True)
    out = torch.empty_like(parameters)
    to_halves = out.chunk(2, 1)
    direct = rows.arrange(to_halves[0]) is to_halves[0]
    results = to_halves if direct else (rows.result(), rows.result())
    to_noise = rows.result() if of_noise else parameters.new_empty(0)
    if rows.size:
        _sample_backward[rows.grid](
            grad, *contiguous(grad_kl), *tensors, *results, to_noise,
            rows.inner, *strides, *rows.strides(results[0], per_sample=True),
            OF_NOISE=of_noise, BLOCK=BLOCK,
        )  # fmt: skip
    if not direct:
        for half, result in zip(to_halves, results, strict=True):
            half.copy_(result)
    return out, rows.finish([to_noise])[0] if of_noise else to_noise


def _pairs(output: Tensor, target: Tensor) -> tuple[Rows, list[Tensor], list[int]]:
    rows = Rows(output)
    tensors = [rows.arrange(x) for x in (output, target)]
    return rows, tensors, rows.strides(*tensors, per_sample=True)


def reconstruction_loss(output: Tensor, target: Tensor, kind: int) -> Tensor:
    rows, tensors, strides = _pairs(output, target)
    sums = _sums(rows, output)
    if rows.size:
        _loss[rows.grid](*tensors, sums, rows.inner, *strides, KIND=kind, BLOCK=BLOCK)
    return sums.sum(1)


def reconstruction_loss_backward(grad: Tensor, output: Tensor, target: Tensor, kind: int) -> Tensor:
    rows, tensors, strides = _pairs(output, target)
    to_output = rows.result()
    if rows.size:
        _loss_backward[rows.grid](
            grad.contiguous(), *tensors, to_output, rows.inner, *strides, KIND=kind, BLOCK=BLOCK
        )
    return rows.finish([to_output])[0]

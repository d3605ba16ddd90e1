"""One denoising step and its backward: the formulas stand in aigc_fast/ops/scheduler_step.py.

One program takes BLOCK elements of one sample. `e0` to `e4` are the noise, if there is noise, and
the history; column FIRST + i of the coefficients belongs to e_i.
"""

import triton
import triton.language as tl
from torch import Tensor

from .guidance import guided_output, rescale_factors
from .math import fp32
from .per_sample import BLOCK, Rows, load, locate, store

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (112, 0), "_backward": (96, 0)}


@triton.jit
def _coefficient(ptr, row, stride, i: tl.constexpr):
    return tl.load(ptr + row * stride + i)


@triton.jit
def _add(y, ptr, coefficients_ptr, row, coefficients_stride, column: tl.constexpr, inner, at, mask):
    return y + _coefficient(coefficients_ptr, row, coefficients_stride, column) * load(
        ptr, row, inner, at, mask
    )


@triton.jit
def _forward(
    sample_ptr, output_ptr, uncond_ptr, factors_ptr, coefficients_ptr, e0, e1, e2, e3, e4,
    prev_ptr, x0_ptr, inner, sample_stride, output_stride, uncond_stride, coefficients_stride,
    scale, GUIDED: tl.constexpr, RESCALED: tl.constexpr, FIRST: tl.constexpr,
    EXTRAS: tl.constexpr, RETURN_X0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    k, ks = coefficients_ptr, coefficients_stride
    x = load(sample_ptr, row, sample_stride, at, mask)
    scale = fp32(scale)
    m = guided_output(
        output_ptr, uncond_ptr, row, output_stride, uncond_stride, at, mask, scale, GUIDED
    )
    if RESCALED:
        m *= tl.load(factors_ptr + row)
    x0 = _coefficient(k, row, ks, 0) * x + _coefficient(k, row, ks, 1) * m
    r = _coefficient(k, row, ks, 2)
    x0 = tl.where(x0 > r, r, tl.where(x0 < -r, -r, x0))  # keeps NaN
    y = _coefficient(k, row, ks, 3) * x0 + _coefficient(k, row, ks, 4) * x
    y += _coefficient(k, row, ks, 5) * m
    if EXTRAS > 0:
        y = _add(y, e0, k, row, ks, FIRST, inner, at, mask)
    if EXTRAS > 1:
        y = _add(y, e1, k, row, ks, FIRST + 1, inner, at, mask)
    if EXTRAS > 2:
        y = _add(y, e2, k, row, ks, FIRST + 2, inner, at, mask)
    if EXTRAS > 3:
        y = _add(y, e3, k, row, ks, FIRST + 3, inner, at, mask)
    if EXTRAS > 4:
        y = _add(y, e4, k, row, ks, FIRST + 4, inner, at, mask)
    store(prev_ptr, row, inner, at, mask, y)
    if RETURN_X0:
        store(x0_ptr, row, inner, at, mask, x0)


@triton.jit
def _scaled(
    ptr, g, coefficients_ptr, row, coefficients_stride, column: tl.constexpr, inner, at, mask
):
    y = g * _coefficient(coefficients_ptr, row, coefficients_stride, column)
    store(ptr, row, inner, at, mask, y)


@triton.jit
def _backward(
    grad_ptr, grad_x0_ptr, sample_ptr, output_ptr, uncond_ptr, coefficients_ptr, d_sample_ptr,
    d_output_ptr, d_uncond_ptr, e0, e1, e2, e3, e4, inner, grad_stride, grad_x0_stride,
    sample_stride, output_stride, uncond_stride, coefficients_stride, scale,
    GUIDED: tl.constexpr, HAS_X0: tl.constexpr, FIRST: tl.constexpr, EXTRAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    k, ks = coefficients_ptr, coefficients_stride
    scale = fp32(scale)
    x = load(sample_ptr, row, sample_stride, at, mask)
    m = guided_output(
        output_ptr, uncond_ptr, row, output_stride, uncond_stride, at, mask, scale, GUIDED
    )
    g = load(grad_ptr, row, grad_stride, at, mask)
    a, b = _coefficient(k, row, ks, 0), _coefficient(k, row, ks, 1)
    t = _coefficient(k, row, ks, 3) * g
    if HAS_X0:
        t += load(grad_x0_ptr, row, grad_x0_stride, at, mask)
    t = tl.where(tl.abs(a * x + b * m) <= _coefficient(k, row, ks, 2), t, 0.0)
    store(d_sample_ptr, row, inner, at, mask, a * t + _coefficient(k, row, ks, 4) * g)
    dm = b * t + _coefficient(k, row, ks, 5) * g
    if GUIDED:
        store(d_output_ptr, row, inner, at, mask, scale * dm)
        store(d_uncond_ptr, row, inner, at, mask, (1.0 - scale) * dm)
    else:
        store(d_output_ptr, row, inner, at, mask, dm)
    if EXTRAS > 0:
        _scaled(e0, g, k, row, ks, FIRST, inner, at, mask)
    if EXTRAS > 1:
        _scaled(e1, g, k, row, ks, FIRST + 1, inner, at, mask)
    if EXTRAS > 2:
        _scaled(e2, g, k, row, ks, FIRST + 2, inner, at, mask)
    if EXTRAS > 3:
        _scaled(e3, g, k, row, ks, FIRST + 3, inner, at, mask)
    if EXTRAS > 4:
        _scaled(e4, g, k, row, ks, FIRST + 4, inner, at, mask)


# ---- launchers --------------------------------------------------------------------------------


def _table(coefficients: Tensor) -> tuple[Tensor, int]:
    """The coefficients in fp32, and the elements from one sample's row to the next."""
    coefficients = coefficients.float().contiguous()
    return coefficients, coefficients.shape[1] if coefficients.dim() == 2 else 0


def _five(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (5 - len(tensors))]


def scheduler_step(
    sample, model_output, coefficients, history, noise=None, uncond_output=None,
    guidance_scale=1.0, guidance_rescale=0.0, return_x0=False,
) -> list[Tensor]:  # fmt: skip
    rows = Rows(sample)
    x, m, u = map(rows.arrange, (sample, model_output, uncond_output))
    extras = [rows.dense(t) for t in (noise, *history) if t is not None]
    results = [rows.result() for _ in range(1 + return_x0)]
    table, table_stride = _table(coefficients)
    rescaled = guidance_rescale != 0
    strides = rows.strides(x, m, u, per_sample=rescaled or table_stride > 0)
    if rows.size:
        factors = None
        if rescaled:
            factors = rescale_factors(rows, m, u, strides[1:], guidance_scale, guidance_rescale)
        _forward[rows.grid](
            x, m, u, factors, table, *_five(extras), results[0], results[1] if return_x0 else None,
            rows.inner, *strides, table_stride, float(guidance_scale), GUIDED=u is not None,
            RESCALED=rescaled, FIRST=7 if noise is None else 6, EXTRAS=len(extras),
            RETURN_X0=return_x0, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish(results)


def scheduler_step_backward(
    grad, grad_x0, sample, model_output, coefficients, uncond_output, guidance_scale, has_noise,
    num_history,
) -> list[Tensor]:  # fmt: skip
    rows = Rows(sample)
    g, g_x0, x, m, u = map(rows.arrange, (grad, grad_x0, sample, model_output, uncond_output))
    guided, extras = u is not None, int(has_noise) + num_history
    results = [rows.result() for _ in range(2 + guided + extras)]
    table, table_stride = _table(coefficients)
    strides = rows.strides(g, g_x0, x, m, u, per_sample=table_stride > 0)
    if rows.size:
        _backward[rows.grid](
            g, g_x0, x, m, u, table, results[0], results[1], results[2] if guided else None,
            *_five(results[2 + guided :]), rows.inner, *strides, table_stride,
            float(guidance_scale), GUIDED=guided, HAS_X0=g_x0 is not None,
            FIRST=6 if has_noise else 7, EXTRAS=extras, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish(results)

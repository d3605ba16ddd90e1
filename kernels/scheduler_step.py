"""One denoising step and its backward: the formulas stand in aigc_fast/ops/scheduler_step.py.

One program takes BLOCK elements of one sample. `e0` to `e5` are the noise, if there is noise, and
the history; column FIRST + i of the coefficients belongs to e_i. The second result's columns stand
SECOND further on; SECOND is 0 where there is none.
"""

import triton
import triton.language as tl
from torch import Tensor

from .guidance import guided_output, rescale_factors
from .math import fp32
from .per_sample import BLOCK, Rows, locate, store
from .rows import load

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (144, 0), "_backward": (96, 0)}  # five tensors of history, two results


@triton.jit
def _coefficient(ptr, row, stride, i: tl.constexpr):
    return tl.load(ptr + row * stride + i)


@triton.jit
def _add(y, w, ptr, k, row, ks, column: tl.constexpr, SECOND: tl.constexpr, inner, at, mask):
    e = load(ptr, row, inner, at, mask)
    y += _coefficient(k, row, ks, column) * e
    if SECOND > 0:
        w += _coefficient(k, row, ks, column + SECOND) * e
    return y, w


@triton.jit
def _forward(
    sample_ptr, output_ptr, uncond_ptr, factors_ptr, coefficients_ptr, e0, e1, e2, e3, e4, e5,
    prev_ptr, x0_ptr, second_ptr, inner, sample_stride, output_stride, uncond_stride,
    coefficients_stride, scale, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    k, ks = coefficients_ptr, coefficients_stride
    x = load(sample_ptr, row, sample_stride, at, mask)
    scale = fp32(scale)
    m = guided_output(output_ptr, uncond_ptr, row, output_stride, uncond_stride, at, mask, scale)
    if factors_ptr is not None:
        m *= tl.load(factors_ptr + row)
    x0 = _coefficient(k, row, ks, 0) * x + _coefficient(k, row, ks, 1) * m
    r = _coefficient(k, row, ks, 2)
    x0 = tl.where(x0 > r, r, tl.where(x0 < -r, -r, x0))  # keeps NaN
    y = _coefficient(k, row, ks, 3) * x0 + _coefficient(k, row, ks, 4) * x
    y += _coefficient(k, row, ks, 5) * m
    w = y
    if SECOND > 0:
        w = _coefficient(k, row, ks, 3 + SECOND) * x0 + _coefficient(k, row, ks, 4 + SECOND) * x
        w += _coefficient(k, row, ks, 5 + SECOND) * m
    if e0 is not None:
        y, w = _add(y, w, e0, k, row, ks, FIRST, SECOND, inner, at, mask)
    if e1 is not None:
        y, w = _add(y, w, e1, k, row, ks, FIRST + 1, SECOND, inner, at, mask)
    if e2 is not None:
        y, w = _add(y, w, e2, k, row, ks, FIRST + 2, SECOND, inner, at, mask)
    if e3 is not None:
        y, w = _add(y, w, e3, k, row, ks, FIRST + 3, SECOND, inner, at, mask)
    if e4 is not None:
        y, w = _add(y, w, e4, k, row, ks, FIRST + 4, SECOND, inner, at, mask)
    if e5 is not None:
        y, w = _add(y, w, e5, k, row, ks, FIRST + 5, SECOND, inner, at, mask)
    store(prev_ptr, row, inner, at, mask, y)
    if x0_ptr is not None:
        store(x0_ptr, row, inner, at, mask, x0)
    if SECOND > 0:
        store(second_ptr, row, inner, at, mask, w)


@triton.jit
def _scaled(g, g2, k, row, ks, column: tl.constexpr, SECOND: tl.constexpr):
    y = g * _coefficient(k, row, ks, column)
    if SECOND > 0:
        y += g2 * _coefficient(k, row, ks, column + SECOND)
    return y


@triton.jit
def _backward(
    grad_ptr, grad_x0_ptr, grad_second_ptr, sample_ptr, output_ptr, uncond_ptr, coefficients_ptr,
    d_sample_ptr, d_output_ptr, d_uncond_ptr, e0, e1, e2, e3, e4, e5, inner, grad_stride,
    grad_x0_stride, grad_second_stride, sample_stride, output_stride, uncond_stride,
    coefficients_stride, scale, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    k, ks = coefficients_ptr, coefficients_stride
    scale = fp32(scale)
    x = load(sample_ptr, row, sample_stride, at, mask)
    m = guided_output(output_ptr, uncond_ptr, row, output_stride, uncond_stride, at, mask, scale)
    g = load(grad_ptr, row, grad_stride, at, mask)
    a, b = _coefficient(k, row, ks, 0), _coefficient(k, row, ks, 1)
    g2 = g
    if SECOND > 0:
        g2 = load(grad_second_ptr, row, grad_second_stride, at, mask)
    t = _scaled(g, g2, k, row, ks, 3, SECOND)
    if grad_x0_ptr is not None:
        t += load(grad_x0_ptr, row, grad_x0_stride, at, mask)
    t = tl.where(tl.abs(a * x + b * m) <= _coefficient(k, row, ks, 2), t, 0.0)
    store(d_sample_ptr, row, inner, at, mask, a * t + _scaled(g, g2, k, row, ks, 4, SECOND))
    dm = b * t + _scaled(g, g2, k, row, ks, 5, SECOND)
    if uncond_ptr is not None:
        store(d_output_ptr, row, inner, at, mask, scale * dm)
        store(d_uncond_ptr, row, inner, at, mask, (1.0 - scale) * dm)
    else:
        store(d_output_ptr, row, inner, at, mask, dm)
    if e0 is not None:
        store(e0, row, inner, at, mask, _scaled(g, g2, k, row, ks, FIRST, SECOND))
    if e1 is not None:
        store(e1, row, inner, at, mask, _scaled(g, g2, k, row, ks, FIRST + 1, SECOND))
    if e2 is not None:
        store(e2, row, inner, at, mask, _scaled(g, g2, k, row, ks, FIRST + 2, SECOND))
    if e3 is not None:
        store(e3, row, inner, at, mask, _scaled(g, g2, k, row, ks, FIRST + 3, SECOND))
    if e4 is not None:
        store(e4, row, inner, at, mask, _scaled(g, g2, k, row, ks, FIRST + 4, SECOND))
    if e5 is not None:
        store(e5, row, inner, at, mask, _scaled(g, g2, k, row, ks, FIRST + 5, SECOND))


# ---- launchers --------------------------------------------------------------------------------


def _table(coefficients: Tensor) -> tuple[Tensor, int]:
    """The coefficients in fp32, and the elements from one sample's row to the next."""
    coefficients = coefficients.float().contiguous()
    return coefficients, coefficients.shape[1] if coefficients.dim() == 2 else 0


def _six(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (6 - len(tensors))]


def _second(table: Tensor, num_history: int) -> int:
    """The columns from a coefficient to that of the second result, or 0 where there is none."""
    return 4 + num_history if table.shape[-1] > 7 + num_history else 0


def scheduler_step(sample, model_output, coefficients, noise=None) -> Tensor:
    return scheduler_step_full(sample, model_output, coefficients, (), noise)[0]


def scheduler_step_both(
    sample, model_output, coefficients, history, noise=None
) -> tuple[Tensor, Tensor]:
    prev, x0 = scheduler_step_full(
        sample, model_output, coefficients, history, noise, return_x0=True
    )
    return prev, x0


def scheduler_step_full(
    sample, model_output, coefficients, history, noise=None, uncond_output=None,
    guidance_scale=1.0, guidance_rescale=0.0, return_x0=False,
) -> list[Tensor]:  # fmt: skip
    rows = Rows(sample)
    x, m, u = map(rows.arrange, (sample, model_output, uncond_output))
    extras = [rows.dense(t) for t in (noise, *history) if t is not None]
    table, table_stride = _table(coefficients)
    second = _second(table, len(history))
    results = [rows.result() for _ in range(1 + return_x0 + (second > 0))]
    rescaled = guidance_rescale != 0
    strides = rows.strides(x, m, u, per_sample=rescaled or table_stride > 0)
    if rows.size:
        factors = None
        if rescaled:
            factors = rescale_factors(rows, m, u, strides[1:], guidance_scale, guidance_rescale)
        _forward[rows.grid](
            x, m, u, factors, table, *_six(extras), results[0], results[1] if return_x0 else None,
            results[-1] if second else None, rows.inner, *strides, table_stride,
            float(guidance_scale), FIRST=7 if noise is None else 6, SECOND=second, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish(results)


def scheduler_step_backward(
    grad, grad_x0, grad_second, sample, model_output, coefficients, uncond_output, guidance_scale,
    has_noise, num_history,
) -> list[Tensor]:  # fmt: skip
    rows = Rows(sample)
    g, g_x0, g_second = map(rows.arrange, (grad, grad_x0, grad_second))
    x, m, u = map(rows.arrange, (sample, model_output, uncond_output))
    guided, extras = u is not None, int(has_noise) + num_history
    results = [rows.result() for _ in range(2 + guided + extras)]
    table, table_stride = _table(coefficients)
    second = 0 if g_second is None else _second(table, num_history)
    strides = rows.strides(g, g_x0, g_second, x, m, u, per_sample=table_stride > 0)
    if rows.size:
        _backward[rows.grid](
            g, g_x0, g_second, x, m, u, table, results[0], results[1],
            results[2] if guided else None, *_six(results[2 + guided :]), rows.inner, *strides,
            table_stride, float(guidance_scale), FIRST=6 if has_noise else 7,
            SECOND=second, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish(results)

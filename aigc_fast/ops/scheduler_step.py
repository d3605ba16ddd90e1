"""One denoising step of any linear diffusion solver, guidance included, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._registry import define
from aigc_fast.ops._scheduler_step_reference import (
    check,
    check_backward,
    reference,
    reference_backward,
    reference_both,
    reference_full,
)


def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor | Sequence[float] | Sequence[Sequence[float]],
    *,
    noise: Tensor | None = None,
    history: Sequence[Tensor] = (),
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The sample at the previous timestep, or (that sample, x0).

        x0     = clamp(A * sample + B * m, -r, r)
        prev   = P * x0 + Q * sample + R * m + N * noise + sum_k H_k * history[k]
        second = p * x0 + q * sample + r * m + n * noise + sum_k h_k * history[k]

    sample:       (batch, ...), float64/32/16 or bfloat16. Its memory order is that of the results.
    model_output: shape and dtype of sample, as all tensors below. A batch of samples that are
                  dense one by one (half of a packed output) is read in place.
    coefficients: the row (A, B, r, P, Q, R, N, H_1, ..., H_k), k = len(history), for all samples,
                  or (batch, 7 + k) with a row for each. With (p, q, r, n, h_1, ..., h_k) behind it
                  `second` is returned too, as the last result. A float32 or float64 tensor on the
                  device of sample, or Python floats (aigc_fast.schedulers.Row names them).
                  Floats become a tensor in every call, which takes 5 us; a tensor makes no graph of
                  its own for each step under torch.compile, and may change between replays of a
                  CUDA graph. r may be inf.
    noise:        standard normal noise, or None for zero.
    history:      up to five earlier tensors, those that a multistep solver keeps.
    uncond_output: the unconditional output u of the model; then m = u + guidance_scale *
                  (model_output - u), else m = model_output.
    guidance_rescale: phi; m is multiplied with phi * std(model_output) / std(m) + 1 - phi, the
                  deviations taken over each sample. This reads the outputs once more.
    return_x0:    whether x0 is returned too, in the dtype of sample.

    Computes in fp32 (fp64 for fp64) and rounds once. Zero times inf is NaN, also for a zero
    coefficient. Differentiable to any order with respect to all tensors but the coefficients; at
    |x0| = r the derivative is that inside. With guidance_rescale there is no derivative.
    Bytes that must move: (3 + the number of optional tensors) times sample; backward (4 + the
    same number, those of uncond_output and x0 counted twice).

    Raises TypeError or ValueError for a wrong dtype, shape, device or number of coefficients.

    Source: the linear solvers (DDPM arXiv:2006.11239, DDIM 2010.02502, DPM-Solver++ 2211.01095);
    guidance: Ho & Salimans, 2207.12598; rescaling: Lin et al. 2023, 2305.08891, section 3.4.
    """
    if not isinstance(coefficients, Tensor):
        dtype = wide_dtype(sample.dtype)
        coefficients = torch.tensor(coefficients, dtype=dtype, device=sample.device)
    if torch.is_grad_enabled() and (
        sample.requires_grad
        or model_output.requires_grad
        or coefficients.requires_grad
        or (noise is not None and noise.requires_grad)
        or (uncond_output is not None and uncond_output.requires_grad)
        or (history and any(earlier.requires_grad for earlier in history))
    ):
        if guidance_rescale != 0:
            raise RuntimeError(
                "scheduler_step has no derivative: guidance_rescale must be 0 for gradients, "
                f"got {guidance_rescale} (or call it under torch.no_grad)"
            )
        if coefficients.requires_grad:
            raise RuntimeError("scheduler_step has no derivative with respect to coefficients")
        results = _SchedulerStep.call(
            sample, model_output, uncond_output, noise, coefficients, guidance_scale, return_x0,
            *history,
        )  # fmt: skip
    else:
        results = _run(
            sample, model_output, coefficients, history, noise, uncond_output, guidance_scale,
            guidance_rescale, return_x0,
        )  # fmt: skip
    return results if len(results) > 1 else results[0]


def _run(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    guidance_rescale: float,
    return_x0: bool,
) -> tuple[Tensor, ...]:
    """All results, by the schema that costs a call least."""
    if (
        uncond_output is None
        and guidance_scale == 1
        and guidance_rescale == 0
        and coefficients.dim() > 0
        and coefficients.size(-1) == 7 + len(history)
    ):
        if return_x0:
            return _scheduler_step_both(sample, model_output, coefficients, history, noise)
        if len(history) == 0:
            return (_scheduler_step(sample, model_output, coefficients, noise),)
    return tuple(
        _scheduler_step_full(
            sample, model_output, coefficients, history, noise, uncond_output, guidance_scale,
            guidance_rescale, return_x0,
        )
    )  # fmt: skip


# Steps without guidance that return prev, or prev and x0, have schemas of their own: a list of
# results costs a call 0.7 us, one of arguments 0.2 us, and a tensor of 64x64x4 takes 0.4 us.
_scheduler_step = define(
    "scheduler_step(Tensor sample, Tensor model_output, Tensor coefficients, Tensor? noise=None)"
    " -> Tensor",
    reference,
    lambda sample, output, coefficients, noise=None: check(sample, output, coefficients, (), noise),
    stem="scheduler_step",
)
_scheduler_step_both = define(
    "scheduler_step_both(Tensor sample, Tensor model_output, Tensor coefficients, Tensor[] history,"
    " Tensor? noise=None) -> (Tensor, Tensor)",
    reference_both,
    check,
    stem="scheduler_step",
)
_scheduler_step_full = define(
    "scheduler_step_full(Tensor sample, Tensor model_output, Tensor coefficients,"
    " Tensor[] history, Tensor? noise=None, Tensor? uncond_output=None,"
    " float guidance_scale=1.0, float guidance_rescale=0.0, bool return_x0=False) -> Tensor[]",
    reference_full,
    check,
    stem="scheduler_step",
)
_backward = define(
    "scheduler_step_backward(Tensor grad_output, Tensor? grad_x0, Tensor? grad_second,"
    " Tensor sample, Tensor model_output, Tensor coefficients, Tensor? uncond_output,"
    " float guidance_scale, bool has_noise, int num_history) -> Tensor[]",
    reference_backward,
    check_backward,
    stem="scheduler_step",
)


class _SchedulerStep(OpFunction):
    @staticmethod
    def forward(
        ctx: Any,
        sample: Tensor,
        model_output: Tensor,
        uncond_output: Tensor | None,
        noise: Tensor | None,
        coefficients: Tensor,
        guidance_scale: float,
        return_x0: bool,
        *history: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sample, model_output, uncond_output, coefficients)
        ctx.options = guidance_scale, noise is not None, len(history), return_x0
        return _run(
            sample, model_output, coefficients, history, noise, uncond_output, guidance_scale, 0.0,
            return_x0,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple:
        sample, model_output, uncond_output, coefficients = ctx.saved_tensors
        guidance_scale, has_noise, num_history, return_x0 = ctx.options
        grad_x0 = others[0] if return_x0 else None
        grad_second = others[-1] if len(others) > return_x0 else None
        if grad is None:
            grad = torch.zeros_like(sample)
        # Linear in the gradients, so that their derivative is torch's own.
        run = reference_backward if torch.is_grad_enabled() else _backward
        grad_sample, grad_output, *rest = run(
            grad, grad_x0, grad_second, sample, model_output, coefficients, uncond_output,
            guidance_scale, has_noise, num_history,
        )  # fmt: skip
        grad_uncond = grad_noise = None
        if uncond_output is not None:
            grad_uncond, *rest = rest
        if has_noise:
            grad_noise, *rest = rest
        return grad_sample, grad_output, grad_uncond, grad_noise, None, None, None, *rest

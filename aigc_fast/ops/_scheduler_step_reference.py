"""What a step of a linear diffusion solver computes, in plain PyTorch, and what it refuses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import strided_as, wide_dtype

_MAX_HISTORY = 5


def _columns(coefficients: Tensor, sample: Tensor) -> tuple[torch.dtype, tuple[Tensor, ...]]:
    """The dtype to compute in, and the columns in it, broadcastable over sample."""
    dtype = wide_dtype(sample.dtype)
    if coefficients.dim() == 2:
        ones = [1] * (sample.dim() - 1)
        coefficients = coefficients.reshape(coefficients.shape[0], *ones, coefficients.shape[1])
    return dtype, coefficients.to(dtype).unbind(-1)


def _guided(
    output: Tensor, uncond: Tensor | None, scale: float, rescale: float, dtype: torch.dtype
) -> Tensor:
    m = output.to(dtype)
    if uncond is None:
        return m
    cond, u = m, uncond.to(dtype)
    m = u + scale * (cond - u)
    if rescale != 0:
        dims = list(range(1, m.dim()))
        ratio = cond.std(dims, correction=0, keepdim=True) / m.std(dims, correction=0, keepdim=True)
        m = m * (rescale * ratio + (1 - rescale))
    return m


def reference_full(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    return_x0: bool = False,
) -> list[Tensor]:
    dtype, (a, b, r, *rest) = _columns(coefficients, sample)
    x = sample.to(dtype)
    m = _guided(model_output, uncond_output, guidance_scale, guidance_rescale, dtype)
    x0 = (a * x + b * m).clamp(-r, r)

    def combine(p: Tensor, q: Tensor, c: Tensor, n: Tensor, *h: Tensor) -> Tensor:
        y = p * x0 + q * x + c * m
        if noise is not None:
            y = y + n * noise.to(dtype)
        for scale, earlier in zip(h, history, strict=True):
            y = y + scale * earlier.to(dtype)
        return y

    terms = 4 + len(history)
    results = [combine(*rest[:terms])]
    if return_x0:
        results.append(x0)
    if len(rest) > terms:
        results.append(combine(*rest[terms:]))
    return [strided_as(t, sample) for t in results]


def reference(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, noise: Tensor | None = None
) -> Tensor:
    return reference_full(sample, model_output, coefficients, (), noise)[0]


def reference_both(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    prev, x0 = reference_full(sample, model_output, coefficients, history, noise, return_x0=True)
    return prev, x0


def reference_backward(
    grad_output: Tensor,
    grad_x0: Tensor | None,
    grad_second: Tensor | None,
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    has_noise: bool,
    num_history: int,
) -> list[Tensor]:
    dtype, (a, b, r, *rest) = _columns(coefficients, sample)
    m = _guided(model_output, uncond_output, guidance_scale, 0.0, dtype)
    inside = (a * sample.to(dtype) + b * m).abs() <= r
    terms = 4 + num_history
    g = grad_output.to(dtype)
    inner = [scale * g for scale in rest[:terms]]
    if grad_second is not None:
        g = grad_second.to(dtype)
        inner = [y + scale * g for y, scale in zip(inner, rest[terms:], strict=True)]
    through_x0, dx, dm, d_noise, *d_history = inner
    t = through_x0 if grad_x0 is None else through_x0 + grad_x0.to(dtype)
    t = torch.where(inside, t, 0.0)
    dm = b * t + dm
    grads = [a * t + dx, dm]
    if uncond_output is not None:
        grads = [grads[0], dm * guidance_scale, dm * (1 - guidance_scale)]
    grads += [d_noise, *d_history] if has_noise else d_history
    # Out of place: under create_graph these are differentiated again.
    return [strided_as(t, sample) for t in grads]


def check(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    return_x0: bool = False,
) -> None:
    check_tensor("sample", sample)
    check_tensor("model_output", model_output, like=("sample", sample), shape=sample.shape)
    if noise is not None:
        check_tensor("noise", noise, like=("sample", sample), shape=sample.shape)
    if len(history) > _MAX_HISTORY:
        raise ValueError(f"history must hold at most {_MAX_HISTORY} tensors, got {len(history)}")
    for k, earlier in enumerate(history):
        check_tensor(f"history[{k}]", earlier, like=("sample", sample), shape=sample.shape)
    if uncond_output is not None:
        check_tensor("uncond_output", uncond_output, like=("sample", sample), shape=sample.shape)
    elif guidance_scale != 1 or guidance_rescale != 0:
        raise ValueError(
            "uncond_output must be given for guidance_scale != 1 or guidance_rescale != 0, got None"
        )
    if guidance_rescale != 0 and sample.dim() < 2:
        raise ValueError(
            "sample must have more than a batch dimension for guidance_rescale, "
            f"got shape {tuple(sample.shape)}"
        )
    _check_coefficients(coefficients, sample, len(history))


def _check_coefficients(coefficients: Tensor, sample: Tensor, num_history: int) -> None:
    check_tensor("coefficients", coefficients, dtypes=(torch.float32, torch.float64))
    columns, both = 7 + num_history, 11 + 2 * num_history
    shape = tuple(coefficients.shape)
    if shape[-1:] not in ((columns,), (both,)) or shape[:-1] not in ((), tuple(sample.shape[:1])):
        raise ValueError(
            f"coefficients must have shape ({columns},) or (batch, {columns}) = "
            f"({sample.shape[0] if sample.dim() else 1}, {columns}): 7 + len(history) columns, "
            f"or {both} for two results; got {shape}"
        )
    check_device("coefficients", coefficients, ("sample", sample))


def check_backward(
    grad_output: Tensor,
    grad_x0: Tensor | None,
    grad_second: Tensor | None,
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    has_noise: bool,
    num_history: int,
) -> None:
    history = [sample] * num_history
    check(sample, model_output, coefficients, history, None, uncond_output, guidance_scale)
    check_tensor("grad_output", grad_output, like=("sample", sample), shape=sample.shape)
    for grad in (grad_x0, grad_second):
        if grad is not None:
            check_tensor("grad_output", grad, like=("sample", sample), shape=sample.shape)

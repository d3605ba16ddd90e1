"""Noise added to a batch for diffusion training, and the v or flow target in the same pass."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import strided_as, wide_dtype
from aigc_fast.ops._registry import define


def add_noise(
    sample: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    return_velocity: bool = False,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """noisy = alpha * sample + sigma * noise, and its velocity along the way from one to the other:
    alpha_rate * sample + sigma_rate * noise.

    sample: (batch, ...), float64/32/16 or bfloat16. Its memory order is that of the results.
    noise:  shape and dtype of sample.
    alpha, sigma: (batch,), any floating dtype: sqrt(alphas_cumprod[t]) and
            sqrt(1 - alphas_cumprod[t]) of each sample's timestep. Best kept in float32.
    return_velocity: (noisy, velocity) is returned in place of noisy.
    rates:  (alpha_rate, sigma_rate), each (batch,): how alpha and sigma change. By default
            (-sigma, alpha), that of a quarter circle: the velocity is then the v target
            alpha * noise - sigma * sample. (-1, 1) is that of flow matching, where alpha is
            1 - sigma: noise - sample.

    Computes in fp32 (fp64 for fp64) and rounds once. Differentiable to any order with respect to
    all tensors. Bytes that must move: 3 times sample, 4 with the velocity.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4; v: Salimans & Ho 2022, arXiv:2202.00512;
    flow matching: Liu et al. 2022, arXiv:2209.03003.
    """
    if rates is not None and not return_velocity:
        raise ValueError("rates are for return_velocity=True")
    if noise is None:  # for the operators it stands for zeros
        raise TypeError("noise must be a torch.Tensor, got None")
    if torch.is_grad_enabled() and (
        sample.requires_grad or noise.requires_grad or alpha.requires_grad or sigma.requires_grad
        or (rates is not None and (rates[0].requires_grad or rates[1].requires_grad))
    ):  # fmt: skip
        results = _AddNoise.call(
            sample, noise, alpha, sigma, *(rates or (None, None)), return_velocity
        )
        return results if return_velocity else results[0]
    if return_velocity:
        return _add_noise_velocity(sample, noise, alpha, sigma, *(rates or ()))
    return _add_noise(sample, noise, alpha, sigma)


def _mixed(sample: Tensor, noise: Tensor | None, of_sample: Tensor, of_noise: Tensor) -> Tensor:
    dtype = wide_dtype(sample.dtype)

    def wide(scale: Tensor) -> Tensor:
        return scale.to(dtype).reshape(-1, *[1] * (sample.dim() - 1))

    x = sample.to(dtype)
    z = torch.zeros_like(x) if noise is None else noise.to(dtype)
    return strided_as(wide(of_sample) * x + wide(of_noise) * z, sample)


def _reference_velocity(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    alpha_rate: Tensor | None = None,
    sigma_rate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if alpha_rate is None or sigma_rate is None:
        alpha_rate, sigma_rate = -sigma, alpha
    return _mixed(sample, noise, alpha, sigma), _mixed(sample, noise, alpha_rate, sigma_rate)


def _check(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    alpha_rate: Tensor | None = None,
    sigma_rate: Tensor | None = None,
) -> None:
    check_tensor("sample", sample)
    if sample.dim() == 0:
        raise ValueError("sample must have a batch dimension, got shape ()")
    if noise is not None:
        check_tensor("noise", noise, like=("sample", sample), shape=sample.shape)
    scales = [("alpha", alpha), ("sigma", sigma)]
    if alpha_rate is not None and sigma_rate is not None:
        scales += [("rates[0]", alpha_rate), ("rates[1]", sigma_rate)]
    for name, scale in scales:
        check_tensor(name, scale, shape=sample.shape[:1])
        check_device(name, scale, ("sample", sample))


_add_noise = define(
    "add_noise(Tensor sample, Tensor noise, Tensor alpha, Tensor sigma) -> Tensor",
    _mixed,
    _check,
    stem="add_noise",
)
_add_noise_velocity = define(
    "add_noise_velocity(Tensor sample, Tensor? noise, Tensor alpha, Tensor sigma,"
    " Tensor? alpha_rate=None, Tensor? sigma_rate=None) -> (Tensor, Tensor)",
    _reference_velocity,
    _check,
    stem="add_noise",
)


class _AddNoise(OpFunction):
    """The map (sample, noise) -> (noisy, velocity), a matrix of two by two scales for each sample;
    the adjoint is the transposed one, so sigma and alpha_rate change places."""

    @staticmethod
    def forward(
        ctx: Any,
        sample: Tensor,
        noise: Tensor | None,
        alpha: Tensor,
        sigma: Tensor,
        alpha_rate: Tensor | None,
        sigma_rate: Tensor | None,
        return_velocity: bool,
    ) -> tuple[Tensor, ...]:
        scales = (alpha, sigma, alpha_rate, sigma_rate)
        # Only the gradients of the scales need the tensors themselves.
        learned = any(s is not None and s.requires_grad for s in scales)
        ctx.save_for_backward(*scales, *((sample, noise) if learned else ()))
        if return_velocity:
            return _add_noise_velocity(sample, noise, alpha, sigma, alpha_rate, sigma_rate)
        return (_add_noise(sample, noise, alpha, sigma),)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_velocity: Tensor | None = None) -> tuple:
        alpha, sigma, alpha_rate, sigma_rate, *inputs = ctx.saved_tensors
        transposed = (alpha, alpha_rate, sigma, sigma_rate)
        if alpha_rate is None:
            transposed = (alpha, -sigma, None, None)
        if torch.is_grad_enabled():
            grad_sample, grad_noise = _AddNoise.call(grad, grad_velocity, *transposed, True)
        else:
            grad_sample, grad_noise = _add_noise_velocity(grad, grad_velocity, *transposed)
        if not inputs:
            return grad_sample, grad_noise, None, None, None, None, None
        sample, noise = inputs
        grads = [_dot(grad, sample), _dot(grad, noise), None, None]
        of_rates = [_dot(grad_velocity, sample), _dot(grad_velocity, noise)]
        if alpha_rate is None:  # it is -sigma, and sigma_rate is alpha
            grads[:2] = grads[0] + of_rates[1], grads[1] - of_rates[0]
        else:
            grads[2:] = of_rates
        scales = (alpha, sigma, alpha_rate, sigma_rate)
        of_alpha, of_sigma, *rest = (
            None if s is None else g.to(s.dtype) for g, s in zip(grads, scales, strict=True)
        )
        if noise is None:
            grad_noise = None
        return grad_sample, grad_noise, of_alpha, of_sigma, *rest, None


def _dot(a: Tensor | None, b: Tensor | None) -> Any:
    """The inner product of each sample, in fp32 or fp64; 0 for an absent tensor."""
    if a is None or b is None:
        return 0.0
    dtype = wide_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).reshape(a.shape[0], a[:1].numel()).sum(1)

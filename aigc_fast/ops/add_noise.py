"""Noise added to a batch for diffusion training, and the v target in the same pass."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import Op


def add_noise(
    sample: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    return_velocity: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """noisy = alpha * sample + sigma * noise, and velocity = alpha * noise - sigma * sample.

    sample: (batch, ...), float64/32/16 or bfloat16. Its memory order is that of the results.
    noise:  shape and dtype of sample.
    alpha, sigma: (batch,), any floating dtype: sqrt(alphas_cumprod[t]) and
            sqrt(1 - alphas_cumprod[t]) of each sample's timestep. Best kept in float32.
    return_velocity: (noisy, velocity) is returned in place of noisy.

    Computes in fp32 (fp64 for fp64) and rounds once. Differentiable without end with respect to
    all four tensors. Bytes that must move: 3 times sample, 4 with the velocity.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4; v: Salimans & Ho 2022, arXiv:2202.00512.
    """
    if torch.is_grad_enabled() and (
        sample.requires_grad or noise.requires_grad or alpha.requires_grad or sigma.requires_grad
    ):
        results = _AddNoise.call(sample, noise, alpha, sigma, return_velocity)
    elif return_velocity:
        results = _add_noise(sample, noise, alpha, sigma, True)
    else:
        results = _add_noise(sample, noise, alpha, sigma)
    return tuple(results) if return_velocity else results[0]


def _reference(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    return_velocity: bool = False,
) -> list[Tensor]:
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    ones = [1] * (sample.dim() - 1)
    a, s = alpha.to(dtype).reshape(-1, *ones), sigma.to(dtype).reshape(-1, *ones)
    x = sample.to(dtype)
    z = torch.zeros_like(x) if noise is None else noise.to(dtype)
    results = [a * x + s * z, a * z - s * x] if return_velocity else [a * x + s * z]
    return [torch.empty_like(sample).copy_(y) for y in results]


def _check(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    return_velocity: bool = False,
) -> None:
    check_tensor("sample", sample)
    if sample.dim() == 0:
        raise ValueError("sample must have a batch dimension, got shape ()")
    if noise is not None:
        check_tensor("noise", noise, like=("sample", sample), shape=sample.shape)
    for name, scale in (("alpha", alpha), ("sigma", sigma)):
        check_tensor(name, scale, shape=sample.shape[:1])
        if scale.device != sample.device:
            raise ValueError(
                f"{name} must be on the device of sample ({sample.device}), got {scale.device}"
            )


_add_noise = Op(
    "add_noise(Tensor sample, Tensor? noise, Tensor alpha, Tensor sigma,"
    " bool return_velocity=False) -> Tensor[]",
    _reference,
    _check,
    stem="add_noise",
)


class _AddNoise(OpFunction):
    """The map (sample, noise) -> (noisy, velocity); with -sigma it is its own adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        sample: Tensor,
        noise: Tensor | None,
        alpha: Tensor,
        sigma: Tensor,
        return_velocity: bool,
    ) -> tuple[Tensor, ...]:
        # Only the gradients of alpha and sigma need the tensors themselves.
        learned = alpha.requires_grad or sigma.requires_grad
        ctx.save_for_backward(alpha, sigma, *((sample, noise) if learned else ()))
        return tuple(_add_noise(sample, noise, alpha, sigma, return_velocity))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_velocity: Tensor | None = None) -> tuple:
        alpha, sigma, *inputs = ctx.saved_tensors
        run = _AddNoise.call if torch.is_grad_enabled() else _add_noise
        grad_sample, grad_noise = run(grad, grad_velocity, alpha, -sigma, True)
        if not inputs:
            return grad_sample, grad_noise, None, None, None
        sample, noise = inputs
        grad_alpha = _dot(grad, sample) + _dot(grad_velocity, noise)
        grad_sigma = _dot(grad, noise) - _dot(grad_velocity, sample)
        if noise is None:
            grad_noise = None
        return grad_sample, grad_noise, grad_alpha.to(alpha.dtype), grad_sigma.to(sigma.dtype), None


def _dot(a: Tensor | None, b: Tensor | None) -> Any:
    """The inner product of each sample, in fp32 or fp64; 0 for an absent tensor."""
    if a is None or b is None:
        return 0.0
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(dtype) * b.to(dtype)).reshape(a.shape[0], a[:1].numel()).sum(1)

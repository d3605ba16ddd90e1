"""The two terms of a VAE's bound: a latent drawn with its KL divergence, and the likelihood."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_choice, check_device, check_tensor, name_of
from aigc_fast.ops._layout import strided_as, wide_dtype
from aigc_fast.ops._registry import define

#: Bounds of the log-variance, diffusers' own; csrc/cpu/elbo.cpp and kernels/elbo.py have them too.
LOWEST, HIGHEST = -30.0, 20.0
#: The numbers are part of the operator's schema: csrc/cpu/elbo.cpp holds the same list.
LIKELIHOODS = ("bernoulli", "gaussian", "laplace")


def sample_gaussian(parameters: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sample, kl): a draw of a diagonal Gaussian and its divergence from the standard normal.

        mean, log_variance = parameters.chunk(2, dim=1), log_variance clamped to [-30, 20]
        sample = mean + exp(log_variance / 2) * noise
        kl     = sum over all but the batch of (mean^2 + exp(log_variance) - 1 - log_variance) / 2

    parameters: (batch, 2 * channels, ...), float64/32/16 or bfloat16, as an encoder gives them.
                Its memory order is that of the sample.
    noise:      (batch, channels, ...), standard normal, dtype of parameters; None for zeros: the
                sample is then the mean.

    sample has the dtype of parameters; kl, in nats, is (batch,) in float32 (float64 for float64).
    Computes in fp32 (fp64 for fp64) and rounds once. Differentiable to any order with respect to
    both tensors: the first gradient is one pass, further ones are torch's. Outside of its bounds
    log_variance has the gradient zero, as torch.clamp has it. Bytes that must move: 4 times the
    sample, 7 times in backward.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Kingma & Welling 2014, arXiv:1312.6114, equation 10 and appendix B; the bounds are those
    of diffusers' DiagonalGaussianDistribution.
    """
    if torch.is_grad_enabled() and (
        parameters.requires_grad or (noise is not None and noise.requires_grad)
    ):
        return _SampleGaussian.call(parameters, noise)
    return _sample_gaussian(parameters, noise)


def reconstruction_loss(output: Tensor, target: Tensor, kind: str = "bernoulli") -> Tensor:
    """-log p(target | output) summed over all but the batch, in nats: (batch,), float32 (float64
    for float64). Nothing of the size of the output is written:

    ========= ======================================== ====================================
    kind      -log p of each element                   p
    ========= ======================================== ====================================
    bernoulli log(1 + e^output) - target * output      output is the logit of a pixel in [0, 1]
    gaussian  (output - target)^2 / 2                  variance 1, without log(2 pi) / 2
    laplace   |output - target|                        scale 1, without log 2
    ========= ======================================== ====================================

    output: (batch, ...), float64/32/16 or bfloat16.
    target: its shape, and its dtype or float32: under autocast the output alone is narrow.

    Computes in fp32 (fp64 for fp64). Differentiable to any order with respect to both: the first
    gradient of the output is one pass, every other one is torch's. Bytes that must move: output and
    target, in backward the gradient too.

    Raises TypeError or ValueError for a wrong dtype, shape, device or kind.

    Source: Kingma & Welling 2014, arXiv:1312.6114, appendix C.
    """
    check_choice("kind", kind, LIKELIHOODS)
    args = output, target, LIKELIHOODS.index(kind)
    if not torch.is_grad_enabled():
        return _loss(*args)
    if target.requires_grad:
        _check_loss(*args)
        return _reference_loss(*args)
    return _ReconstructionLoss.call(*args) if output.requires_grad else _loss(*args)


def _sum_each(x: Tensor) -> Tensor:
    """Of every sample of a batch, which may be empty."""
    return x.reshape(x.shape[0], x[:1].numel()).sum(1)


# ---- a draw and its divergence ----------------------------------------------------------------


def _reference(parameters: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    like = parameters.chunk(2, 1)[0]
    mean, log_variance = parameters.to(wide_dtype(parameters.dtype)).chunk(2, 1)
    log_variance = log_variance.clamp(LOWEST, HIGHEST)
    sample = mean
    if noise is not None:
        sample = mean + torch.exp(0.5 * log_variance) * noise.to(mean.dtype)
    kl = 0.5 * _sum_each(mean.square() + torch.expm1(log_variance) - log_variance)
    return strided_as(sample, like), kl


def _reference_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    parameters: Tensor,
    noise: Tensor | None,
    of_noise: bool,
) -> tuple[Tensor, Tensor]:
    like = parameters.chunk(2, 1)[0]
    mean, raw = parameters.to(wide_dtype(parameters.dtype)).chunk(2, 1)
    log_variance = raw.clamp(LOWEST, HIGHEST)
    to_mean, to_log_variance = torch.zeros_like(mean), torch.zeros_like(mean)
    grad_noise = parameters.new_empty(0)
    if grad_kl is not None:
        scale = grad_kl.view(-1, *[1] * (mean.dim() - 1))
        to_mean = scale * mean
        to_log_variance = 0.5 * scale * torch.expm1(log_variance)
    if grad_sample is not None:
        grad = grad_sample.to(mean.dtype)
        to_mean = to_mean + grad
        if noise is not None:
            deviation = torch.exp(0.5 * log_variance)
            to_log_variance = to_log_variance + 0.5 * grad * deviation * noise.to(mean.dtype)
            if of_noise:
                grad_noise = strided_as(grad * deviation, like)
    inside = (raw >= LOWEST) & (raw <= HIGHEST)
    grads = torch.cat([to_mean, torch.where(inside, to_log_variance, 0.0)], 1)
    return strided_as(grads, parameters), grad_noise


def _check(parameters: Tensor, noise: Tensor | None) -> None:
    check_tensor("parameters", parameters)
    shape = tuple(parameters.shape)
    if len(shape) < 2 or shape[1] % 2:
        raise ValueError(
            f"parameters must have shape (batch, 2 * channels, ...), got shape {shape}"
        )
    if noise is not None:
        half = (shape[0], shape[1] // 2, *shape[2:])
        check_tensor("noise", noise, like=("parameters", parameters), shape=half)


def _check_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    parameters: Tensor,
    noise: Tensor | None,
    of_noise: bool,
) -> None:
    _check(parameters, noise)
    half = parameters.chunk(2, 1)[0]
    if grad_sample is not None:
        check_tensor("grad_sample", grad_sample, like=("parameters", parameters), shape=half.shape)
    if grad_kl is not None:
        dtype = wide_dtype(parameters.dtype)
        check_tensor("grad_kl", grad_kl, dtypes=[dtype], shape=parameters.shape[:1])
    if of_noise and (grad_sample is None or noise is None):
        raise ValueError("of_noise must be False without grad_sample and noise")


_sample_gaussian = define(
    "sample_gaussian(Tensor parameters, Tensor? noise) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="elbo",
)
_sample_gaussian_backward = define(
    "sample_gaussian_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor parameters,"
    " Tensor? noise, bool of_noise) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="elbo",
)


class _SampleGaussian(OpFunction):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.of_noise = noise is not None and noise.requires_grad
        ctx.save_for_backward(parameters, noise)
        return _sample_gaussian(parameters, noise)

    @staticmethod
    def backward(ctx: Any, grad_sample: Tensor | None, grad_kl: Tensor | None) -> tuple:
        if grad_sample is None and grad_kl is None:
            return None, None
        parameters, noise = ctx.saved_tensors
        of_noise = ctx.of_noise and grad_sample is not None
        # A gradient of this gradient is torch's own, through the reference.
        run = _reference_backward if torch.is_grad_enabled() else _sample_gaussian_backward
        grads, grad_noise = run(grad_sample, grad_kl, parameters, noise, of_noise)
        return grads, grad_noise if of_noise else None


# ---- likelihoods ------------------------------------------------------------------------------


def _reference_loss(output: Tensor, target: Tensor, kind: int) -> Tensor:
    x, t = output.to(wide_dtype(output.dtype)), target.to(wide_dtype(output.dtype))
    name = LIKELIHOODS[kind]
    if name == "bernoulli":
        return _sum_each(F.binary_cross_entropy_with_logits(x, t, reduction="none"))
    return _sum_each(0.5 * (x - t).square() if name == "gaussian" else (x - t).abs())


def _reference_loss_backward(grad: Tensor, output: Tensor, target: Tensor, kind: int) -> Tensor:
    x, t = output.to(wide_dtype(output.dtype)), target.to(wide_dtype(output.dtype))
    name = LIKELIHOODS[kind]
    slope = torch.sigmoid(x) - t if name == "bernoulli" else x - t
    if name == "laplace":
        slope = slope.sign()
    scale = grad.view(-1, *[1] * (x.dim() - 1))
    return strided_as(scale * slope, output)


def _check_loss(output: Tensor, target: Tensor, kind: int) -> None:
    check_tensor("output", output)
    if output.dim() == 0:
        raise ValueError("output must have a batch dimension, got shape ()")
    check_tensor("target", target, shape=output.shape)
    if target.dtype not in (output.dtype, wide_dtype(output.dtype)):
        raise TypeError(
            f"target must have the dtype of output ({name_of(output.dtype)}) or float32, "
            f"got {name_of(target.dtype)}"
        )
    check_device("target", target, ("output", output))


def _check_loss_backward(grad: Tensor, output: Tensor, target: Tensor, kind: int) -> None:
    _check_loss(output, target, kind)
    check_tensor("grad_output", grad, dtypes=[wide_dtype(output.dtype)], shape=output.shape[:1])


_loss = define(
    "reconstruction_loss(Tensor output, Tensor target, int kind) -> Tensor",
    _reference_loss,
    _check_loss,
    stem="elbo",
)
_loss_backward = define(
    "reconstruction_loss_backward(Tensor grad_output, Tensor output, Tensor target, int kind)"
    " -> Tensor",
    _reference_loss_backward,
    _check_loss_backward,
    stem="elbo",
)


class _ReconstructionLoss(OpFunction):
    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, kind: int) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(output, target)
        return _loss(output, target, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        run = _reference_loss_backward if torch.is_grad_enabled() else _loss_backward
        output, target = ctx.saved_tensors
        return run(grad, output, target, ctx.kind), None, None

"""Penalties on gradients, for discriminators (gradient penalty, R1, R2) and generators (path
length). Each is a scalar to be added to the loss; its backward is a double backward of the network,
which the operators of this library run on their compiled kernels."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_penalty(
    discriminator: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    labels: Tensor | None = None,
    *,
    target: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean((|dD/dx| - target)^2) at x = fake + u (real - fake), u uniform in [0, 1] per sample.

    real, fake: samples of one shape, (batch, ...); they are taken as constants.
    generator:  draws u, on its own device.

    Source: Gulrajani et al. 2017, arXiv:1704.00028 (WGAN-GP).
    """
    if real.shape != fake.shape:
        raise ValueError(f"fake must have shape {tuple(real.shape)}, got {tuple(fake.shape)}")
    shape = (len(real), *[1] * (real.dim() - 1))
    weight = torch.empty(shape, dtype=real.dtype, device=real.device).uniform_(generator=generator)
    between = torch.lerp(fake.detach(), real.detach(), weight)
    # The norm of a zero vector has a gradient here, 0; the root of its square would give NaN.
    norms = torch.linalg.vector_norm(_input_gradients(discriminator, between, labels), dim=1)
    return (norms - target).square().mean()


def r1_penalty(
    discriminator: Callable[..., Tensor], real: Tensor, labels: Tensor | None = None
) -> Tensor:
    """mean(|dD/dx|^2) / 2 at real samples x, to be weighted by gamma.

    Source: Mescheder et al. 2018, arXiv:1801.04406. The same at generated samples is R2.
    """
    return _input_gradients(discriminator, real, labels).square().sum(1).mean() / 2


def r2_penalty(
    discriminator: Callable[..., Tensor], fake: Tensor, labels: Tensor | None = None
) -> Tensor:
    """mean(|dD/dx|^2) / 2 at generated samples x, which are taken as constants."""
    return r1_penalty(discriminator, fake, labels)


def path_length_penalty(
    images: Tensor,
    latents: Tensor,
    mean_length: Tensor,
    *,
    decay: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean((|J^T y| - a)^2): J = d images / d latents, y standard normal / sqrt(height width).

    images:      (batch, channels, height, width), computed from latents, (batch, ..., dim).
    mean_length: scalar tensor a, the moving average of |J^T y|, updated in place by a share `decay`
                 of the batch's mean, where that is finite. Start with zero.

    Source: Karras et al. 2020, arXiv:1912.04958, section 3.2.
    """
    noise = torch.empty_like(images).normal_(generator=generator)
    noise = noise / (images.shape[-1] * images.shape[-2]) ** 0.5
    (gradient,) = torch.autograd.grad((images * noise).sum(), latents, create_graph=True)
    lengths = torch.linalg.vector_norm(_rows(gradient), dim=1)
    if latents.dim() > 2:  # a latent for each layer: their root mean square
        lengths = lengths / latents[0, ..., 0].numel() ** 0.5
    moved = mean_length.lerp(lengths.detach().mean().to(mean_length), decay)
    mean_length.copy_(torch.where(moved.isfinite(), moved, mean_length))
    return (lengths - mean_length).square().mean()


def _input_gradients(
    discriminator: Callable[..., Tensor], samples: Tensor, labels: Tensor | None
) -> Tensor:
    """dD/dx of each sample as a row, in float32 or better, differentiable."""
    leaf = samples.detach().requires_grad_()
    logits = discriminator(leaf) if labels is None else discriminator(leaf, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
    return _rows(gradient)


def _rows(gradient: Tensor) -> Tensor:
    rows = gradient.flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()

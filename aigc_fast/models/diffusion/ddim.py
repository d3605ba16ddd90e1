"""Sampling with DDIM (Song et al. 2020, arXiv:2010.02502), deterministic."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aigc_fast import ops


def cosine_schedule(num_timesteps: int = 1000) -> tuple[Tensor, Tensor]:
    """alphas and sigmas, float32 (num_timesteps,), of Nichol & Dhariwal (arXiv:2102.09672)."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()


def ddim_rows(alphas: Tensor, sigmas: Tensor, timesteps: Tensor, clip: float = 1.0) -> Tensor:
    """A row of coefficients for `ops.scheduler_step` for each timestep, the model predicting
    v = alpha * noise - sigma * x0:

        x0 = alpha * sample - sigma * v, noise = sigma * sample + alpha * v
        next = next_alpha * clamp(x0, -clip, clip) + next_sigma * noise
    """
    alpha, sigma = alphas.double()[timesteps], sigmas.double()[timesteps]
    # After the last step there is no noise.
    next_alpha = torch.cat([alpha[1:], alpha.new_ones(1)])
    next_sigma = torch.cat([sigma[1:], sigma.new_zeros(1)])
    limit, no_noise = torch.full_like(alpha, clip), torch.zeros_like(alpha)
    columns = [alpha, -sigma, limit, next_alpha, next_sigma * sigma, next_sigma * alpha, no_noise]
    return torch.stack(columns, dim=1).float()


def sample_ddim(
    model: nn.Module,
    noise: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    num_steps: int = 30,
    guidance_scale: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (sample, x0) after every step: where the sample stands, and where it seems to go.

    model: model(sample, timesteps, labels) predicts v.
    noise: standard normal, the start.
    null_label: the class that stands for "any"; where it is given, the model is asked for it too,
        and the prediction is the label's, guidance_scale times as far from it.
    """
    timesteps = torch.linspace(len(alphas) - 1, 0, num_steps).round().long()
    rows = ddim_rows(alphas.cpu(), sigmas.cpu(), timesteps).to(noise.device)
    if labels is not None and null_label is not None:
        labels = torch.cat([labels, torch.full_like(labels, null_label)])
    sample, copies = noise, 1 if null_label is None else 2
    for timestep, row in zip(timesteps.tolist(), rows, strict=True):
        with torch.no_grad():  # no longer than the step: it must not outlive a yield
            model_input = torch.cat([sample] * copies)
            steps = torch.full((len(model_input),), timestep, device=noise.device)
            output, *uncond = model(model_input, steps, labels).chunk(copies)
            sample, x0 = ops.scheduler_step(
                sample,
                output,
                row,
                uncond_output=uncond[0] if uncond else None,
                guidance_scale=guidance_scale,
                return_x0=True,
            )
        yield sample, x0

"""Sampling from a diffusion model, step by step."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aigc_fast.schedulers import Scheduler


def sample_images(
    model: nn.Module,
    noise: Tensor,
    scheduler: Scheduler,
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    num_steps: int = 30,
    guidance_scale: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (sample, x0) after every step: where the sample stands, and where it seems to go.

    model:     model(sample, timesteps, labels) predicts what scheduler.prediction_type says.
    noise:     standard normal, the start.
    null_label: the class that stands for "any"; where it is given, the model is asked for it too,
        and the prediction is the label's, guidance_scale times as far from it.
    """
    scheduler.set_timesteps(num_steps, noise.device)
    if labels is not None and null_label is not None:
        labels = torch.cat([labels, torch.full_like(labels, null_label)])
    sample, copies = noise * scheduler.init_noise_sigma, 1 if null_label is None else 2
    for timestep in scheduler.timesteps.tolist():
        with torch.no_grad():  # no longer than the step: it must not outlive a yield
            model_input = torch.cat([scheduler.scale_model_input(sample, timestep)] * copies)
            steps = torch.full((len(model_input),), timestep, device=noise.device)
            output, *uncond = model(model_input, steps, labels).chunk(copies)
            sample, x0 = scheduler.step(
                output,
                timestep,
                sample,
                uncond_output=uncond[0] if uncond else None,
                guidance_scale=guidance_scale,
                return_x0=True,
            )
        yield sample, x0

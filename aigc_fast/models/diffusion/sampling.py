"""Sampling from a diffusion model, step by step."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from aigc_fast.schedulers import Scheduler
from aigc_fast.schedulers.scheduler import draw_noise


def sample(
    model: nn.Module,
    scheduler: Scheduler,
    shape: Sequence[int],
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    num_steps: int = 30,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    seed: int | Sequence[int] = 0,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """New samples, `shape`, with the dtype and on the device of the model.

    shape:   (batch, ...), what the model takes.
    labels:  (batch,) classes; the other arguments of guidance are those of `sample_images`.
    seed:    of the noise, drawn on the CPU and so the same on every device. Of a sequence each seed
             is that of one sample, which then does not depend on what else is in the batch.
    on_step: called after each step with its number from 1, the sample, and the x0 it leads to: for
             a progress bar, or to keep intermediate images. The tensors stay as they are.

    Raises ValueError for a number of labels or seeds that is not the batch, or what `sample_images`
    raises.
    """
    for name, given in (("labels", labels), ("seed", None if isinstance(seed, int) else seed)):
        if given is not None and len(given) != shape[0]:
            raise ValueError(f"{name} must be {shape[0]}, one for each sample, got {len(given)}")
    seeds = [seed] if isinstance(seed, int) else seed
    random = [torch.Generator().manual_seed(s) for s in seeds]
    like = next(model.parameters())
    noise = draw_noise(like.new_empty(tuple(shape)), random)
    result = noise
    stages = sample_images(
        model, noise, scheduler, labels=labels, null_label=null_label, num_steps=num_steps,
        guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, generator=random,
    )  # fmt: skip
    for number, (result, x0) in enumerate(stages, start=1):
        if on_step is not None:
            on_step(number, result, x0)
    return result


def sample_images(
    model: nn.Module,
    noise: Tensor,
    scheduler: Scheduler,
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    num_steps: int = 30,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (sample, x0) after every step: where the sample stands, and where it seems to go.

    model:     model(sample, timesteps, labels) predicts what scheduler.prediction_type says.
    noise:     standard normal, the start.
    null_label: the class that stands for "any". Where guidance_scale is not 1, the model is asked
        for it too, and the prediction is the label's, guidance_scale times as far from it.
    guidance_rescale: see ops.scheduler_step.
    generator: of the noise of stochastic solvers, or one for each sample.

    Raises ValueError for a guidance_scale without null_label and labels.
    """
    guided = guidance_scale != 1
    if guided:
        if null_label is None or labels is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs labels and null_label")
        labels = torch.cat([labels, torch.full_like(labels, null_label)])
    scheduler.set_timesteps(num_steps, noise.device)
    sample, copies = noise * scheduler.init_noise_sigma, 1 + guided
    for timestep in scheduler.timesteps.tolist():
        with torch.no_grad():  # no longer than the step: it must not outlive a yield
            model_input = torch.cat([scheduler.scale_model_input(sample, timestep)] * copies)
            steps = torch.full((len(model_input),), timestep, device=noise.device)
            output, *uncond = model(model_input, steps, labels).chunk(copies)
            sample, x0 = scheduler.step(
                output,
                timestep,
                sample,
                generator,
                uncond_output=uncond[0] if uncond else None,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale if guided else 0.0,
                return_x0=True,
            )
        yield sample, x0

"""The demo's diffusion model: trained for about a minute, then sampled."""

import copy
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast.io import load_digits
from aigc_fast.models.diffusion import UNet, cosine_schedule, sample_ddim
from aigc_fast.training import DiffusionTrainer

from .demo_gan import progress_bar

BATCH = 64
MAX_EPOCHS = 40
SAMPLING_STEPS = 30
GUIDANCE_SCALE = 2.0
SHOWN = (0, 6, 12, 16, 20, 22, 24, 26, 28, 30)  # the strip's columns: steps done


@dataclass
class DiffusionResult:
    """digits: (count, 28, 28) in [-1, 1], a column for each class; strip: row by row."""

    digits: Tensor
    strip: Tensor
    columns: int


def run(
    console: Console, device: torch.device, *, seconds: float, quick: bool = False
) -> DiffusionResult:
    """Trains as many epochs as `seconds` allow, MAX_EPOCHS at most."""
    torch.manual_seed(0)
    images, labels = load_digits()
    samples = (images[:, None].float() / 127.5 - 1).to(device)
    labels = labels.to(device)
    schedule = cosine_schedule()
    # Convolutions are a tenth faster in this layout (and the operators take either).
    model = UNet().to(device, memory_format=torch.channels_last)
    steps = len(samples) // BATCH
    if quick:
        epochs, samples, labels = 1, samples[::16], labels[::16]
        steps = len(samples) // BATCH
    else:
        epochs = _affordable_epochs(model, schedule, samples, labels, seconds)
    trainer = DiffusionTrainer(model, *schedule, total_steps=epochs * steps)

    start = time.perf_counter()
    mean_loss: float | None = None
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=epochs * steps)
        for state in trainer.train(samples, labels, epochs=epochs, batch_size=BATCH):
            progress.advance(task)
            if state.step == state.steps:
                progress.console.print(str(state))
            if time.perf_counter() - start > 1.3 * seconds:
                progress.console.print(f"{state} [dim](time is up)[/]")
                break
    elapsed = time.perf_counter() - start
    console.print(f"[dim]{epochs * steps} steps of {BATCH} images in {elapsed:.0f} s[/]")

    start = time.perf_counter()
    names = torch.arange(10, device=device).repeat(1 if quick else 8)
    noise = torch.randn(
        (len(names), 1, 28, 28), device=device, generator=trainer.random
    ).contiguous(memory_format=torch.channels_last)
    stages = [noise]
    num_steps = 3 if quick else SAMPLING_STEPS
    for sample, _ in sample_ddim(
        trainer.average, noise, *schedule, labels=names, num_steps=num_steps,
        guidance_scale=GUIDANCE_SCALE,
    ):  # fmt: skip
        stages.append(sample)
    console.print(
        f"[dim]{len(names)} digits in {num_steps} DDIM steps, guidance {GUIDANCE_SCALE}: "
        f"{time.perf_counter() - start:.1f} s[/]"
    )
    stages = torch.stack(stages)[:, :, 0].cpu()
    shown = stages[[i for i in SHOWN if i <= num_steps]]
    strip = shown[:, torch.tensor([2, 3, 5, 8])].transpose(0, 1).flatten(0, 1)
    return DiffusionResult(stages[-1], strip, len(shown))


def _affordable_epochs(model, schedule, samples, labels, seconds) -> int:
    """Epochs that fit in the time, judged by a few steps of a copy: the learning rate falls to
    zero at the last step, so that the number must be known at the first."""
    trial = DiffusionTrainer(copy.deepcopy(model), *schedule, total_steps=10)
    for _ in range(3):
        trial.step(samples[:BATCH], labels[:BATCH]).item()
    start = time.perf_counter()
    for _ in range(8):
        trial.step(samples[:BATCH], labels[:BATCH]).item()
    one = (time.perf_counter() - start) / 8
    return min(MAX_EPOCHS, max(1, int(seconds / one / (len(samples) // BATCH))))

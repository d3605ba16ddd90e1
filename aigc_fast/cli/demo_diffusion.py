"""The demo's diffusion model: trained for about a minute on two cores, then sampled."""

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast._devices import has_fast_bfloat16
from aigc_fast.io import load_digits
from aigc_fast.models.diffusion import SmallUNet, sample_images
from aigc_fast.schedulers import DDIMScheduler
from aigc_fast.training import DiffusionRecipe, DiffusionTrainer

from .demo_gan import progress_bar

BATCH = 32
EPOCHS = 8  # the fewest that gave legible digits
SAMPLING_STEPS = 30
GUIDANCE_SCALE = 2.0
#: What the strip shows: these classes, after so many steps.
STRIP_CLASSES = (2, 3, 5, 8)
STRIP_STEPS = (0, 6, 12, 16, 20, 22, 24, 26, 28, 30)


@dataclass
class DiffusionResult:
    """digits: (count, 28, 28) in [-1, 1], a column for each class; strip: row by row."""

    digits: Tensor
    strip: Tensor
    columns: int


def run(console: Console, device: torch.device, *, quick: bool) -> DiffusionResult:
    """Trains, and samples every class."""
    torch.manual_seed(0)
    images, labels = load_digits()
    samples, labels = images[:, None].to(device), labels.to(device)
    if quick:
        samples, labels = samples[::16], labels[::16]
    # Convolutions are a tenth faster in this layout (and the operators take either).
    model = SmallUNet().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,  # guidance goes past [-1, 1], and back
    )
    trainer = _train(console, model, samples, labels, 1 if quick else EPOCHS)

    start = time.perf_counter()
    num_steps = 3 if quick else SAMPLING_STEPS
    names = torch.arange(10, device=device).repeat(1 if quick else 8)
    noise = torch.randn(len(names), 1, 28, 28, device=device, generator=trainer.random)
    stages = [noise]
    for sample, _ in sample_images(
        trainer.average,
        noise.contiguous(memory_format=torch.channels_last),
        scheduler,
        labels=names,
        null_label=model.num_classes,
        num_steps=num_steps,
        guidance_scale=GUIDANCE_SCALE,
    ):
        stages.append(sample)
    pictures = torch.stack(stages)[:, :, 0].cpu()  # (stage, digit, 28, 28)
    console.print(
        f"[dim]{len(names)} digits in {num_steps} DDIM steps with guidance "
        f"{GUIDANCE_SCALE}: {time.perf_counter() - start:.1f} s[/]"
    )
    shown = [step for step in STRIP_STEPS if step <= num_steps]
    strip = pictures[shown][:, list(STRIP_CLASSES)].transpose(0, 1).flatten(0, 1)
    return DiffusionResult(pictures[-1], strip, len(shown))


def _train(
    console: Console,
    model: SmallUNet,
    samples: Tensor,
    labels: Tensor,
    epochs: int,
) -> DiffusionTrainer:
    total = epochs * (len(samples) // BATCH)
    device = samples.device
    trainer = DiffusionTrainer(
        model,
        DiffusionRecipe(bf16=has_fast_bfloat16(device)),
        done=lambda step: step / total,
        null_label=model.num_classes,
    )
    start = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=total)
        for state in trainer.train(samples, labels, epochs=epochs, batch_size=BATCH):
            progress.advance(task)
            if state.step == state.steps:
                progress.console.print(str(state))
    elapsed = time.perf_counter() - start
    console.print(f"[dim]{total} steps of {BATCH} images in {elapsed:.0f} s[/]")
    return trainer

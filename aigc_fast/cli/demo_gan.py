"""The demo's GAN: digits out of noise."""

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from aigc_fast.io import load_digits
from aigc_fast.models.gan import MLPDiscriminator, MLPGenerator
from aigc_fast.training import GANRecipe, GANTrainer

BATCH = 64
EPOCHS = 42


@dataclass
class GANResult:
    """digits: (count, 28, 28) in [-1, 1]; one loss a step; steps of an epoch."""

    digits: Tensor
    g_losses: list[float]
    d_losses: list[float]
    steps: int


def run(console: Console, device: torch.device, *, quick: bool) -> GANResult:
    """Trains, and draws from the average of the generator's weights."""
    epochs = 1 if quick else EPOCHS
    torch.manual_seed(0)
    images, _ = load_digits()
    samples = images.flatten(1).to(device)
    generator, discriminator = MLPGenerator().to(device), MLPDiscriminator().to(device)
    # Without the noise most samples after 2,700 steps were ones; with it there were most kinds.
    recipe = GANRecipe(instance_noise=0.5)
    trainer = GANTrainer(generator, discriminator, generator.latent_dim, recipe)

    history: list[tuple[Tensor, Tensor]] = []
    start = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=epochs * (len(samples) // BATCH))
        for state in trainer.train(samples, epochs=epochs, batch_size=BATCH):
            history.append((state.g_loss, state.d_loss))
            progress.advance(task)
            if state.step == state.steps and state.epoch in {1, epochs} | set(range(5, epochs, 5)):
                progress.console.print(str(state))
        rate = len(history) / (time.perf_counter() - start)
    console.print(f"[dim]{len(history)} steps of {BATCH} images, {rate:.0f} steps/s[/]")

    with torch.no_grad():
        digits = trainer.average(trainer.latents(96)).view(-1, 28, 28).cpu()
    g_losses, d_losses = (torch.stack(losses).tolist() for losses in zip(*history, strict=True))
    return GANResult(digits, g_losses, d_losses, len(samples) // BATCH)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )

"""Training a GAN: networks and data by name, checkpoints, a log, pictures."""

import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from aigc_fast.io import load_digits, load_images
from aigc_fast.training import (
    RECIPES,
    CSVLog,
    GANRecipe,
    GANStep,
    GANTrainer,
    load_checkpoint,
    save_checkpoint,
)

from .gan_networks import (
    ARCHITECTURES,
    LATENT_DIM,
    Config,
    draw,
    make_discriminator,
    make_generator,
)
from .pictures import save_grid, save_losses

_GRID = 96  # samples of a picture, in rows of twelve


@dataclass(frozen=True)
class Options:
    """Those of the command, which explains them."""

    output: Path
    arch: str = "dcgan"
    loss: str = "wgan-gp"
    data: str = "digits"
    size: int = 28
    channels: int = 32
    conditional: bool = False
    steps: int = 5000
    minutes: float | None = None
    batch: int = 64
    lr: float | None = None
    bf16: bool = False
    seed: int = 0
    every: int = 500
    resume: bool = False

    def recipe(self) -> GANRecipe:
        if self.loss not in RECIPES:
            raise ValueError(f"loss must be one of {', '.join(RECIPES)}, got {self.loss!r}")
        recipe = replace(RECIPES[self.loss], bf16=self.bf16)
        return recipe if self.lr is None else replace(recipe, g_lr=self.lr, d_lr=self.lr)

    def networks(self, image_channels: int, num_classes: int) -> Config:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}")
        return {
            "arch": self.arch,
            "size": self.size,
            "image_channels": image_channels,
            "channels": self.channels,
            "num_classes": num_classes if self.conditional else None,
            # A penalty is of each sample by itself, and a batch norm mixes them.
            "norm": "batch" if self.recipe().penalty is None else None,
        }


def run(console: Console, options: Options) -> int:
    """Exit code: 0, or 2 for options, data or a checkpoint that will not do."""
    try:
        session = Session(console, options)
    except (ValueError, OSError, ImportError) as error:
        console.print(f"[bold red]{error}[/]", soft_wrap=True)
        return 2
    session.train()
    return 0


class Session:
    """A trainer with its data and the files it keeps."""

    def __init__(self, console: Console, options: Options) -> None:
        self.console, self.options = console, options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images, labels = load_data(options.data, options.size)
        if not options.batch <= len(images):
            raise ValueError(f"batch must be at most {len(images)}, the images there are")
        self.samples = (images.float() / 127.5 - 1).to(self.device)
        self.labels = labels.to(self.device) if options.conditional else None
        num_classes = int(labels.max()) + 1
        self.networks = options.networks(images.shape[1], num_classes)
        torch.manual_seed(options.seed)
        # Convolutions in bfloat16 take half the time in this layout, those in float32 the same.
        layout: Any = {"device": self.device, "memory_format": torch.channels_last}
        generator = make_generator(self.networks).to(**layout)
        discriminator = make_discriminator(self.networks).to(**layout)
        self.trainer = GANTrainer(
            generator, discriminator, LATENT_DIM, options.recipe(), seed=options.seed
        )
        options.output.mkdir(parents=True, exist_ok=True)
        self.checkpoint = options.output / "checkpoint.pt"
        if options.resume:
            self._resume()
        elif self.checkpoint.exists():
            raise ValueError(f"{self.checkpoint} exists: --resume goes on from it")
        self.log = CSVLog(
            options.output / "log.csv",
            ["g_loss", "d_loss", "skipped", "seconds"],
            self.trainer.steps_done,
        )
        # The same latents in every picture: one sees them grow.
        fixed = torch.Generator().manual_seed(options.seed)
        self.latents = torch.randn(_GRID, self.trainer.latent_dim, generator=fixed).to(self.device)
        self.classes = None
        if self.labels is not None:
            self.classes = torch.arange(_GRID, device=self.device) % num_classes

    def train(self) -> None:
        options, trainer = self.options, self.trainer
        per_epoch = len(self.samples) // options.batch
        total = options.steps if options.minutes is None else 10**9
        epochs = -(-total // per_epoch)
        states = trainer.train(self.samples, self.labels, epochs=epochs, batch_size=options.batch)
        start, begun = time.perf_counter(), trainer.steps_done
        g_losses: list[Tensor] = []
        d_losses: list[Tensor] = []
        seconds = 0.0
        with _progress_bar(self.console) as progress:
            bar = progress.add_task(
                "", total=total if options.minutes is None else options.minutes * 60
            )
            for state in islice(states, max(total - begun, 0)):
                g_losses.append(state.g_loss)
                d_losses.append(state.d_loss)
                seconds = time.perf_counter() - start
                finished = trainer.steps_done == total or (
                    options.minutes is not None and seconds >= options.minutes * 60
                )
                done = trainer.steps_done if options.minutes is None else seconds
                progress.update(bar, completed=done, description=f"step {trainer.steps_done}")
                if trainer.steps_done % 50 == 0 or finished:
                    self._log(g_losses, d_losses, seconds)
                if trainer.steps_done % options.every == 0 or finished:
                    self._keep(progress.console, state)
                if finished:
                    break
        rate = (trainer.steps_done - begun) / seconds if seconds else 0.0
        self.log.close()
        self.console.print(
            f"{trainer.steps_done} steps of {options.batch} images, {rate:.1f} steps/s, "
            f"{trainer.skipped} updates skipped; checkpoint.pt, log.csv, samples.png and "
            f"losses.png are in {options.output}/",
            soft_wrap=True,
        )

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self.device)
        if state.get("networks") != self.networks:
            raise ValueError(f"{self.checkpoint} is of other networks: {state.get('networks')}")
        self.trainer.load_state_dict(state["trainer"])

    def _log(self, g_losses: list[Tensor], d_losses: list[Tensor], seconds: float) -> None:
        """Means since the last row. Only here does the host wait for the device."""
        g_loss, d_loss = (torch.stack(losses).mean().item() for losses in (g_losses, d_losses))
        self.log.add(self.trainer.steps_done, g_loss, d_loss, self.trainer.skipped, seconds)
        g_losses.clear()
        d_losses.clear()

    def _keep(self, console: Console, state: GANStep) -> None:
        save_checkpoint(
            self.checkpoint, {"networks": self.networks, "trainer": self.trainer.state_dict()}
        )
        images = draw(self.trainer.average, self.latents, self.classes)
        save_grid(self.options.output / "samples.png", images, columns=12)
        rows = self.log.read()
        steps, g_losses, d_losses = ([row[i] for row in rows] for i in range(3))
        save_losses(
            self.options.output / "losses.png", g_losses, d_losses, 10, steps,
            label=f"{self.trainer.recipe.loss} loss",
        )  # fmt: skip
        console.print(str(state))


def load_data(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 (count, channels, size, size), and labels; `name` is "digits" or a folder."""
    if name != "digits":
        if not Path(name).is_dir():
            raise ValueError(f"data must be digits or a folder of images, got {name!r}")
        return load_images(name, size)
    images, labels = load_digits()
    images = images[:, None]
    if size != images.shape[-1]:
        raise ValueError(f"size must be 28 for the digits, got {size}")
    return images, labels


def _progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

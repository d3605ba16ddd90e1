"""`aigc-fast train`: one command for each kind of model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

train = typer.Typer(help="Trains a model; goes on where it was stopped.", no_args_is_help=True)


@train.command()
def gan(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for what is written.")],
    arch: Annotated[str, typer.Option(help="dcgan or mlp.")] = "dcgan",
    loss: Annotated[str, typer.Option(help="As `wgan-gp`; any other word lists them.")] = "wgan-gp",
    data: Annotated[str, typer.Option(help="digits, or a folder of images.")] = "digits",
    size: Annotated[int, typer.Option(help="Pixels: 28, 32, 64 or 128.")] = 28,
    channels: Annotated[int, typer.Option(min=1, help="Width of the networks.")] = 32,
    conditional: Annotated[bool, typer.Option("--conditional", help="Learn the classes.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Batches to train on, in all.")] = 5000,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after so long instead.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 64,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate, not the loss's.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same losses.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
) -> None:
    """Trains a GAN: checkpoint.pt, log.csv, a grid of samples and the loss curves in OUTPUT."""
    from .train_gan import Options, run

    options = Options(
        output, arch, loss, data, size, channels, conditional, steps, minutes, batch, lr, bf16,
        seed, every, resume,
    )  # fmt: skip
    raise typer.Exit(run(Console(highlight=False), options))

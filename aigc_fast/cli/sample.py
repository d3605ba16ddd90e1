"""`aigc-fast sample`: one command for each kind of model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sample = typer.Typer(help="Draws samples from a trained model.", no_args_is_help=True)


@sample.command()
def gan(
    checkpoint: Annotated[Path, typer.Option(exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(dir_okay=False, help="A PNG file.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, help="Samples to draw.")] = 64,
    label: Annotated[
        int | None, typer.Option(min=0, help="The class, of a conditional model; all in turn.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
) -> None:
    """A grid of samples of a GAN that `aigc-fast train gan` trained."""
    from .sample_gan import run

    raise typer.Exit(run(Console(highlight=False), checkpoint, output, count, label, seed))

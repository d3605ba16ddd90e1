"""The commands and their options."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Compiled kernels for generative models: see them run, check them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for the pictures.")] = Path(
        "demo_output"
    ),
    quick: Annotated[bool, typer.Option(help="A few steps of everything, in seconds.")] = False,
) -> None:
    """Text, a GAN and a diffusion model through the compiled kernels, in under three minutes."""
    from .demo import run

    raise typer.Exit(run(Console(highlight=False), output, quick=quick))


@app.command()
def doctor() -> None:
    """What this machine has, which operator runs where, and whether each computes rightly."""
    from .doctor import run

    raise typer.Exit(run(Console(highlight=False)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    family: Annotated[str, typer.Argument(help="One suite, such as norms; all if left out.")] = "",
) -> None:
    """Runs the benchmark suites of a source checkout; further options go to pytest."""
    from .bench import run

    raise typer.Exit(run(Console(highlight=False, stderr=True), family, context.args))

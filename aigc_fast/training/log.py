"""Logs of training: comma-separated values, and TensorBoard's event files."""

import csv
import os
from pathlib import Path

import numpy as np

from aigc_fast.io._whole import written_whole


class CSVLog:
    """Appends a row of numbers for each step to a CSV file, and flushes it at once.

    columns: names of the numbers; the column "step" comes before them.

    last_step: rows after this step are dropped: a run that was killed may have logged steps that
        its checkpoint does not have. 0 begins a new file.
    """

    def __init__(self, path: str | os.PathLike[str], columns: list[str], last_step: int = 0):
        self.path, self.columns = Path(path), ["step", *columns]
        rows = self.read() if last_step and self.path.exists() else []
        # The old log stays until the new one is complete: a kill may come at any moment.
        with written_whole(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(_words(*row) for row in rows if row[0] <= last_step)
        self._file = self.path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def add(self, step: int, *values: float) -> None:
        self._writer.writerow(_words(step, *values))
        self._file.flush()

    def read(self) -> list[list[float]]:
        """The rows of the file, without one that a kill cut short."""
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        return [list(map(float, row)) for row in rows if len(row) == len(self.columns)]

    def close(self) -> None:
        self._file.close()


def _words(step: float, *values: float) -> list[str]:
    return [str(int(step)), *(f"{value:.6g}" for value in values)]


class TensorBoardLog:
    """Event files of numbers and pictures, for `tensorboard --logdir FOLDER`.

    last_step: TensorBoard hides what an earlier run logged after it. 0 begins anew.

    Raises ImportError where the package tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], columns: list[str], last_step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard: this needs the package of that name: pip install tensorboard"
            ) from error
        self.columns = columns
        self._writer = SummaryWriter(os.fspath(folder), purge_step=last_step + 1)

    def add(self, step: int, *values: float) -> None:
        for name, value in zip(self.columns, values, strict=True):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def add_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels: uint8 (height, width) or (height, width, channels)."""
        self._writer.add_image(name, pixels, step, dataformats="HWC"[: pixels.ndim])
        self._writer.flush()

    def add_text(self, step: int, name: str, text: str) -> None:
        """text: shown as Markdown."""
        self._writer.add_text(name, text, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

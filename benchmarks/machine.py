"""What this machine is and how fast its memory is."""

import ctypes
import functools
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from aigc_fast import _libraries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Large blocks that a call frees serve the next call. By default glibc returns them to the
    system, which clears every page of the next one: up to five times as long as an operator takes,
    for each variant alike, and unsteady on a virtual machine. No effect on other C libraries.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def processor() -> str:
    """Name of the GPU, or of the CPU with its threads and instruction-set level."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.*)", info.read_text())):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads, {_libraries.cpu_level()}"


def slug() -> str:
    """The processor as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")


def describe() -> dict[str, str]:
    """What a reader needs to judge a figure."""
    import triton

    import aigc_fast

    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "aigc_fast": aigc_fast.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The short name of HEAD; empty for a copy without a repository, or where git is not."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            git, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except FileNotFoundError:
        return ""


def plain_pass(size: int, kind: str) -> Callable[[], torch.Tensor]:
    """A pass over `size` bytes that does nothing else: "read" (a sum), "copy" (half read, half
    written) or "add" (two read, one written). The last two allocate their outputs, as operators do.
    """
    tensors = {"read": 1, "copy": 2, "add": 3}[kind]
    x = torch.ones(max(size // (4 * tensors), 1), device=DEVICE)
    return {"read": x.sum, "copy": x.clone, "add": functools.partial(torch.add, x, x.clone())}[kind]


def peak_memory(call: Callable[[], object]) -> int:
    """Most bytes that the call holds at a time, beside those of before, its outputs included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak

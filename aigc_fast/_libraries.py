"""Finds and opens the compiled libraries, and remembers what could not be opened and why."""

import os
import warnings
from pathlib import Path

import torch

LIB = Path(__file__).parent / "lib"
MEND = "build them with `pip install --no-build-isolation -e .` (or `make build`)"

# What each instruction-set level of csrc/cpu was compiled for; the first that fits is taken.
CPU_LEVELS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),
}

#: "cpu" and "cuda": the file each was loaded from.
loaded: dict[str, Path] = {}
#: "cpu" and "cuda": why one is not there, in words.
missing: dict[str, str] = {}


def features() -> dict[str, bool]:
    """What this processor has; nothing where aigc_fast._host was not built."""
    try:
        from aigc_fast._host import cpu_features
    except ImportError:
        return {}
    return cpu_features()


def cpu_level() -> str:
    """Level of csrc/cpu for this machine; AIGC_FAST_CPU=avx512|avx2|baseline forces one."""
    from aigc_fast._host import cpu_features

    features = cpu_features()
    wish = os.environ.get("AIGC_FAST_CPU")
    if wish is None:
        return next(
            level for level, needs in CPU_LEVELS.items() if all(features.get(n) for n in needs)
        )
    if wish not in CPU_LEVELS:
        raise ValueError(f"AIGC_FAST_CPU must be one of {', '.join(CPU_LEVELS)}, got {wish!r}")
    lacking = [need for need in CPU_LEVELS[wish] if not features.get(need)]
    if lacking:
        raise ValueError(f"AIGC_FAST_CPU={wish}: this CPU lacks {', '.join(lacking)}")
    return wish


def loaded_level() -> str | None:
    """The level of csrc/cpu that was loaded, if any was."""
    path = loaded.get("cpu")
    return None if path is None else path.stem.removeprefix("cpu_")


def _load(kind: str, name: str) -> None:
    path = LIB / f"{name}.so"
    if not path.exists():
        missing[kind] = f"{path.name} has not been built"
        return
    try:
        torch.ops.load_library(path)
        loaded[kind] = path
    except OSError as error:
        missing[kind] = f"{path.name} does not load: {error}"


def load() -> None:
    """Opens the CPU library of this machine's level and, where it was built, the CUDA library."""
    try:
        level = cpu_level()
    except ImportError as error:
        missing["cpu"] = f"aigc_fast._host does not import: {error}"
    else:
        _load("cpu", f"cpu_{level}")
    _load("cuda", "cuda")
    # Nobody without a GPU misses the CUDA library.
    wanted = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    absent = [missing[kind] for kind in wanted if kind in missing]
    if absent:
        warnings.warn(
            f"aigc_fast runs without compiled libraries ({'; '.join(absent)}): "
            f"its operators fall back to plain PyTorch. To mend it, {MEND}.",
            stacklevel=3,
        )

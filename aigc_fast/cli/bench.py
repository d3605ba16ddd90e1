"""`aigc-fast bench`: the pytest-benchmark suites of a source checkout."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import aigc_fast


def suites() -> dict[str, Path]:
    """The suites by name; none outside of a source checkout."""
    checkout = Path(aigc_fast.__file__).resolve().parent.parent
    files = sorted((checkout / "benchmarks").glob("bench_*.py"))
    return {file.stem.removeprefix("bench_"): file for file in files}


def run(console: Console, family: str, options: Sequence[str]) -> int:
    found = suites()
    if not found:
        console.print(
            "The benchmarks are not part of the installed package. Clone the repository and run "
            "aigc-fast bench (or make bench) there."
        )
        return 2
    if family.startswith("-"):  # no family, but an option for pytest
        family, options = "", [family, *options]
    if family and family not in found:
        console.print(f"There is no suite {family!r}; there are {', '.join(found)}.")
        return 2
    if any(importlib.util.find_spec(name) is None for name in ("pytest", "pytest_benchmark")):
        console.print("The benchmarks need: pip install pytest pytest-benchmark")
        return 2
    files = [found[family]] if family else list(found.values())
    # An absolute path tells pytest where its configuration lies.
    command = [sys.executable, "-m", "pytest", "--benchmark-enable", *map(str, files), *options]
    return subprocess.run(command, cwd=files[0].parent.parent).returncode

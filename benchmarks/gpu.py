"""Everything that needs a GPU, in under nine minutes: tests, sanitizer, benchmarks.

    python -m benchmarks.gpu [folder]      (what `make gpu` runs after the build)

Copies the results into `folder` too, if one is given or $OUT names one.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.machine import slug
from benchmarks.report import HERE, RESULTS

ROOT = HERE.parent
START = time.monotonic()


def step(title: str, command: list[str], limit: float) -> bool:
    """Runs one step; a failure is told and remembered, the next step still runs."""
    print(f"\n== {title} ({time.monotonic() - START:.0f} s)", flush=True)
    try:
        return not subprocess.run(command, cwd=ROOT, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        print(f"{title}: not finished in {limit:.0f} s")
        return False


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device; `make bench` measures the CPU")
    python = sys.executable
    passed = [
        step(
            "tests on the device",
            [
                python,
                "-m",
                "pytest",
                "-q",
                "tests/ops",
                "tests/test_graphs.py",
                "tests/models/test_decoding_graph.py",
                "tests/models/test_sampler.py",
                "tests/training/test_gan_graph.py",
                "-k",
                "cuda and not cpu-cpu",
                "--maxfail=30",
            ],
            200,
        )
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("\n== compute-sanitizer is not installed: the kernels were not checked by it")
    else:
        some = ["tests/ops/test_every_op.py", "-k", "cuda and matches_reference and float16"]
        passed.append(
            step(
                "compute-sanitizer on a small set",
                [sanitizer, "--error-exitcode=1", python, "-m", "pytest", "-q", *some],
                100,
            )
        )
    passed.append(step("benchmarks", [python, "-m", "benchmarks.report"], 220))
    folder = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT")
    if folder:
        for file in RESULTS.glob(f"{slug()}.*"):
            shutil.copy(file, Path(folder) / file.name)
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()

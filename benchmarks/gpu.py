"""Everything that needs a GPU, in under nine minutes with the build: tests, benchmarks, sanitizer.

    python -m benchmarks.gpu [folder]      (what `make gpu` runs after the build)

Each step has its seconds: what has not begun by then is skipped and counted, the rest is told.
Copies the results into `folder` too, if one is given or $OUT names one.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.machine import slug
from benchmarks.report import HERE, RESULTS

ROOT = HERE.parent
START = time.monotonic()
#: after its seconds, for what a step has begun, and after that for the summary
GRACE, SUMMARY = 40, 15
#: graphs first: they are few, and the most likely to fail
TESTS = [
    "tests/test_graphs.py",
    "tests/models/test_decoding_graph.py",
    "tests/models/test_sampler.py",
    "tests/training/test_gan_graph.py",
    "tests/ops",
]


def step(title: str, command: list[str], limit: float, **environment: str) -> bool:
    """Runs one step; a failure is told and remembered, the next step still runs."""
    print(f"\n== {title} ({time.monotonic() - START:.0f} s)", flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, start_new_session=True
    )
    try:
        return process.wait(limit + GRACE) == 0
    except subprocess.TimeoutExpired:
        print(f"{title}: not finished in {limit + GRACE:.0f} s", flush=True)
        os.killpg(process.pid, signal.SIGINT)  # pytest then tells what it has found so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SUMMARY)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def pytest(seconds: float, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "tests.on_device"),
        *("--continue-on-collection-errors", f"--seconds={seconds}", *arguments),
    ]


def test_workers() -> list[str]:
    """A test compiles Triton's kernels for most of its time, which takes a core each."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(len(os.sched_getaffinity(0)), 16))]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device; `make bench` measures the CPU")
    tests = pytest(170, *TESTS, *test_workers(), "--maxfail=60")
    passed = [step("tests on the device", tests, 170)]
    report = [sys.executable, "-m", "benchmarks.report", "--largest", "--seconds=200"]
    passed.append(step("benchmarks", report, 200))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("\n== compute-sanitizer is not installed: the kernels were not checked by it")
    else:
        some = pytest(30, "tests/ops/test_every_op.py", "-k", "test_matches_reference and float16")
        # torch's pool would hide an access beyond a tensor's end
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--error-exitcode=1", "--target-processes=all", *some]
        passed.append(step("compute-sanitizer, as far as it comes", command, 30, **alone))
    folder = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT")
    if folder:
        for file in RESULTS.glob(f"{slug()}.*"):
            shutil.copy(file, Path(folder) / file.name)
    print(f"\n== {'passed' if all(passed) else 'FAILED'} ({time.monotonic() - START:.0f} s)")
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()

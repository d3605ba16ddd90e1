"""The plugin by which `make gpu` runs the tests, and what it leaves to run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import on_device

ROOT = Path(__file__).parents[1]


def collect(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.on_device", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_what_runs_on_the_device_remains() -> None:
    found = collect("--collect-only", "tests/ops/test_snake.py", "tests/ops/test_rms_norm.py")
    assert "test_sine_of_any_size[1.0-triton-" in found
    assert "test_triton_rows_wider_than_a_block" in found  # marked
    assert "-cpu-cpu]" not in found and "test_third_derivative" not in found


def test_what_has_no_time_is_skipped_and_counted() -> None:
    found = collect("--seconds=0", "tests/ops/test_rms_norm.py")
    assert "SKIPPED [2]" in found and "no time was left after 0 s" in found


def test_a_device_in_error_ends_the_process(request, monkeypatch) -> None:
    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match=r"in_error.*illegal memory access"):
        on_device.pytest_runtest_teardown(request.node)

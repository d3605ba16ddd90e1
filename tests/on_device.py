"""What `make gpu` needs of pytest: python -m pytest -p tests.on_device [--seconds N] ...

Of the tests only those remain that run on the GPU: parametrised with a device or an implementation
of it, or marked `gpu`. Benchmarks all remain.
"""

import os
import sys
import time
from typing import Any

import pytest
import torch

START = time.monotonic()
ON_DEVICE = ("cuda", "triton")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, help="what has not begun so long after the start is skipped"
    )


def runs_on_device(item: Any) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        item.get_closest_marker("gpu") is not None
        or getattr(item, "originalname", "").startswith("bench_")
        or any(parameters.get(name) in ON_DEVICE for name in ("implementation", "device"))
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if runs_on_device(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - START > limit:
        pytest.skip(f"no time was left after {limit:.0f} s")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """An error of a kernel is told in its own test. After some, an address out of bounds for one,
    every later call of the process fails: it ends, and pytest-xdist begins another."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{item.nodeid} left the device in error: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)

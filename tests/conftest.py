"""Test-wide settings: Triton's interpreter where there is no GPU, and poisoned memory."""

import ctypes
import os

# libgomp's threads spin between operators; where another process has the core, that costs a
# time slice each. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
# Tests check the implementation they name; a silent fall-back would check the reference.
os.environ.setdefault("AIGC_FAST_STRICT", "1")

# glibc fills every new allocation with 0x7f bytes (3.4e38 in fp32 and bf16, NaN in fp16), so that
# an element that a kernel forgets to write shows as an absurd value.
_M_PERTURB = -6
ctypes.CDLL(None).mallopt(_M_PERTURB, 0x80)


# The workers of pytest-xdist share the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_checks_pointers():
    """In Triton's interpreter every load and store must stay inside a tensor of the launch."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.pointer_check import checked_interpreter

    with checked_interpreter():
        yield

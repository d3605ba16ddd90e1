"""Builds the CUDA kernels of a stem so that they run on a CPU (cuda_on_cpu.h)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

#: how the kernels number the dtypes
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build(stem: str, folder: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    path = folder.mktemp("cuda_on_cpu") / f"{stem}.so"
    source = Path(__file__).parent / f"{stem}_on_cpu.cpp"
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-g", "-shared", "-fPIC", source, "-o", path],
        check=True,
    )
    return ctypes.CDLL(str(path))

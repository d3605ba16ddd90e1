"""Every Triton kernel compiles for the GPUs we support, within the budget written beside it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# All launches of all samples take ten minutes of a core: `--most` leaves a part of them. Those of
# bias_act are many and small: one in thirty spilled.
@pytest.mark.parametrize(
    ("arch", "most", "operators"), [(80, 1, []), (90, 4, []), (100, 1, []), (80, 99, ["bias_act"])]
)
def test_kernels_keep_their_budgets(arch, most, operators, tmp_path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = [str(arch), *operators, "--most", str(most)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_ahead", *options],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    compiled = {(row["stem"], row["kernel"]) for row in rows}
    for row in rows:
        budget = importlib.import_module(f"aigc_fast.kernels.{row['stem']}").BUDGET
        registers, shared = budget[row["kernel"]]
        assert row["REG"] <= registers, row
        assert row["shared"] <= shared, row
        assert row["STACK"] == row["LOCAL"] == 0, f"spills: {row}"
    # Each kernel that has a budget was compiled: none is there unseen.
    for stem in {stem for stem, _ in compiled}:
        names = importlib.import_module(f"aigc_fast.kernels.{stem}").BUDGET
        assert {kernel for s, kernel in compiled if s == stem} == set(names)

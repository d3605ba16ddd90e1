"""What `unpatch` must bring back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

import aigc_fast


def snapshot(model: Any) -> Any:
    """Everything that unpatch must bring back, by identity."""
    state = [(id(m), type(m), dict(m.__dict__)) for m in model.modules()]
    return state, dict(vars(model.config)), {key: id(p) for key, p in model.named_parameters()}


@contextmanager
def everything_comes_back(model: nn.Module) -> Iterator[Any]:
    """The report of patching the model, for the block to look at; then it is as it was before."""
    before, keys = snapshot(model), list(model.state_dict())
    classes = {path: type(module) for path, module in model.named_modules()}
    report = aigc_fast.patch(model)
    assert list(model.state_dict()) == keys
    assert aigc_fast.patch(model) == report and report.replaced
    for path, module in model.named_modules():
        assert isinstance(module, classes[path])
    yield report
    for _ in range(2):
        aigc_fast.unpatch(model)
        assert snapshot(model) == before

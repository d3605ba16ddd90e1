"""The modules against torch's own, over several batches and with its weights in them."""

import pytest
import torch
from torch import nn

from aigc_fast.nn import BatchNormAct1d, BatchNormAct2d

ACTS = [("lrelu", {"alpha": 0.2}, nn.LeakyReLU(0.2)), ("relu", {}, nn.ReLU()), ("linear", {}, nn.Identity())]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(("act", "options", "activation"), ACTS, ids=lambda v: str(v))
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"eps": 0.8}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9, 6), (4, 6, 5), (4, 6, 5, 3)], ids=str)
def test_is_batch_norm_and_activation(shape, kwargs, act, options, activation) -> None:
    ours_of, theirs_of = (
        (BatchNormAct2d, nn.BatchNorm2d) if len(shape) == 4 else (BatchNormAct1d, nn.BatchNorm1d)
    )
    ours = ours_of(6, **kwargs, act=act, **options, dtype=torch.float64)
    theirs = theirs_of(6, **kwargs, dtype=torch.float64)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = 3 + torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), activation(theirs(x)))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), activation(theirs(x)))


def test_checks_the_shape_as_torch_does() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormAct2d(3)(torch.randn(2, 3))
    assert "6" in repr(BatchNormAct2d(6, act="lrelu")) and "lrelu" in repr(BatchNormAct2d(6, act="lrelu"))  # fmt: skip  # noqa: E501

"""What the table of samples does not say of alias_free_snake."""

import pytest
import torch

from aigc_fast import ops
from aigc_fast.ops.alias_free_snake import _reference, default_filters
from tests.op_samples import rand
from tests.op_samples.snake import positive


@pytest.mark.parametrize("time", [1, 2, 3, 4, 11, 511, 512, 1023, 1024, 40_000])
def test_gradients_are_those_of_the_plain_chain(time) -> None:
    """Every sample of every gradient, the ends among them, for rows of one tile and of many."""
    inputs = [t.requires_grad_() for t in (rand(1, 2, time), positive(2), positive(2, seed=1))]
    y = ops.alias_free_snake(*inputs)
    plain = _reference(*inputs, *default_filters(torch.device("cpu")))
    torch.testing.assert_close(y, plain)
    upstream = rand(*y.shape, seed=3)
    ours, theirs = (torch.autograd.grad(t, inputs, upstream) for t in (y, plain))
    torch.testing.assert_close(ours, theirs)


def test_filters_have_no_gradient() -> None:
    with pytest.raises(ValueError, match="down_filter must not require a gradient"):
        taps = rand(12).requires_grad_()
        ops.alias_free_snake(rand(1, 2, 3), positive(2), None, None, taps)

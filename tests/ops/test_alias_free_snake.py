"""What the table of samples does not say of alias_free_snake."""

import pytest
import torch

from aigc_fast import ops
from aigc_fast.ops.alias_free_snake import REACH, _reference, default_filters
from tests.op_samples import rand
from tests.op_samples.alias_free_snake import channels_innermost
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 24, 64, 200])
@pytest.mark.parametrize("time", [1, 2, 5, 300])
def test_memory_order_is_kept(time, channels, dtype) -> None:
    """Channels innermost stay so, and give what the same sequences give when they are contiguous;
    from any sample on, so that a sequence may be computed in parts."""
    x = rand(2, channels, time, scale=50.0).to(dtype)
    x[:, :, ::7] *= 1e3  # whose sine is the C library's
    a, b = positive(channels).to(dtype), positive(channels, seed=1).to(dtype)
    last = channels_innermost(x)
    y, want = ops.alias_free_snake(last, a, b), ops.alias_free_snake(x, a, b)
    assert y.stride() == last.stride() and want.is_contiguous()
    assert y.equal(want)
    for part in (x[..., time // 3 :], channels_innermost(x[..., time // 3 :])):
        some = ops.alias_free_snake(part, a, b)
        assert some[..., REACH:].equal(want[..., time // 3 + REACH :])


def test_filters_have_no_gradient() -> None:
    with pytest.raises(ValueError, match="down_filter must not require a gradient"):
        taps = rand(12).requires_grad_()
        ops.alias_free_snake(rand(1, 2, 3), positive(2), None, None, taps)

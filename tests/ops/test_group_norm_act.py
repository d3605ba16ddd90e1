"""What the table of samples does not say of group_norm_act."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from tests.op_samples import channels_last, rand
from tests.ops.test_every_op import DEVICE


def _variables(order=torch.contiguous_format) -> list[torch.Tensor]:
    x = rand(2, 12, 9, 8).contiguous(memory_format=order)
    return [t.requires_grad_() for t in (x, rand(12, seed=1), rand(12, seed=2))]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_is_group_norm_and_silu_in_the_order_of_x(order) -> None:
    x, weight, bias = inputs = _variables(order)
    ours = ops.group_norm_act(x, 4, weight, bias, 1e-3, "silu")
    theirs = F.silu(F.group_norm(x, 4, weight, bias, 1e-3))
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == x.stride()
    ours = torch.autograd.grad(ours.pow(3).sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs.pow(3).sum(), inputs))
    assert ours[0].stride() == x.stride()


def test_frozen_parameters_and_frozen_input() -> None:
    x, weight, bias = inputs = _variables()
    all_three = torch.autograd.grad(ops.group_norm_act(x, 4, weight, bias).square().sum(), inputs)
    for i, t in enumerate(inputs):
        alone = [t if i == j else s.detach() for j, s in enumerate(inputs)]
        out = ops.group_norm_act(alone[0], 4, *alone[1:]).square().sum()
        assert torch.equal(torch.autograd.grad(out, t)[0], all_three[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_mean_far_from_zero_leaves_the_variance(dtype, order) -> None:
    # In fp32 a difference of squares would have nothing left: mean^2 is 10^8 times the variance.
    steps = torch.arange(2 * 8 * 40 * 40).reshape(2, 8, 40, 40) * 7 % 16
    x = (1024 + 8 * steps if dtype == torch.bfloat16 else 65536 + 0.5 * steps).to(dtype)
    x = x.contiguous(memory_format=order)
    exact = F.group_norm(x.double(), 2)
    torch.testing.assert_close(ops.group_norm_act(x, 2).double(), exact, rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_triton_cuts_large_groups(monkeypatch, order) -> None:
    from aigc_fast.kernels import channel_tiles, group_norm_act

    monkeypatch.setattr(group_norm_act, "_WHOLE", 0)
    for name, value in {"_TILE": 64, "_PROGRAMS": 24, "_CHANNELS": 8}.items():
        monkeypatch.setattr(channel_tiles, name, value)
    inputs = [t.detach().float().to(DEVICE).requires_grad_() for t in _variables(order)]
    results = []
    for backend in ("triton", "reference"):
        with aigc_fast.backend(backend):
            y = ops.group_norm_act(inputs[0], 4, *inputs[1:], 1e-5, "silu")
            results.append((y, torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_one_position_of_channels_last_is_contiguous_too() -> None:
    x = channels_last(rand(3, 8, 1, 1))
    torch.testing.assert_close(ops.group_norm_act(x, 2), F.group_norm(x, 2))

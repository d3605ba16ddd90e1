"""What the table of samples does not say of swiglu and geglu."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from tests.op_samples import rand
from tests.ops.test_every_op import IMPLEMENTATIONS


def test_is_silu_times_up_and_so_are_its_gradients() -> None:
    packed = rand(3, 5, 34).requires_grad_()
    gate, up = packed.chunk(2, -1)
    ours, theirs = ops.swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), packed),
        torch.autograd.grad(theirs.square().sum(), packed),
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_is_gelu_times_up_and_so_are_its_gradients(approximate) -> None:
    packed = rand(3, 5, 34, scale=3).requires_grad_()
    gate, up = packed.chunk(2, -1)
    ours = ops.geglu(gate, up, approximate=approximate)
    theirs = F.gelu(gate, approximate=approximate) * up
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), packed),
        torch.autograd.grad(theirs.square().sum(), packed),
    )


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS[:2])
def test_gelu_keeps_its_relative_precision(implementation, device) -> None:
    # 1 + erf(x / sqrt(2)), torch's form, has none left at -6.
    inf = torch.tensor([torch.inf], device=device)
    x = torch.linspace(-5, 5, 8192).to(device)
    exact = x.double() * torch.special.ndtr(x.double())
    with aigc_fast.backend(implementation):
        y = ops.geglu(x, torch.ones_like(x))
        assert ops.geglu(inf, inf) == inf
    _, exponent = torch.frexp(exact)
    units = (y - exact).abs() / torch.ldexp(torch.tensor(1.0), exponent - 24)
    assert units[x > -1].max() < 4
    assert units.max() < 24  # exp takes x^2 / 2 rounded: up to 2^-21 at -5


def test_halves_of_a_packed_tensor_are_read_in_place() -> None:
    gate, up = torch.randn(64, 2048).chunk(2, -1)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = ops.swiglu(gate, up)
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages())
    assert y.nbytes <= allocated < 2 * y.nbytes

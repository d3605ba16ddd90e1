"""What the table of samples does not say of snake."""

import pytest
import torch

from aigc_fast import backend, ops
from tests.ops.test_every_op import IMPLEMENTATIONS


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS[:2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4, 3e5, 1e8])
def test_sine_of_any_size(scale, implementation, device) -> None:
    """As exact for large arguments as for small ones, x itself taken as what float32 holds."""
    x = (torch.randn(1, 1, 1000) * scale).to(device).requires_grad_()
    one = torch.ones(1, device=device)
    with backend(implementation):
        y = ops.snake(x, one, 1e-6 * one)
        (slope,) = torch.autograd.grad(y.sum(), x)
    at = x.detach().double()
    # A small beta makes sin^2 the larger term.
    exact = at + at.sin() ** 2 / (torch.tensor(1e-6).double() + 1e-9)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e6 * 2**-22 + scale * 2**-22)
    exact = 1 + (2 * at).sin() / (torch.tensor(1e-6).double() + 1e-9)
    torch.testing.assert_close(slope.double(), exact, rtol=0, atol=1e6 * 2**-21)


def test_third_derivative() -> None:
    x, alpha, beta = (
        t.double().requires_grad_() for t in (torch.randn(2, 3, 4), torch.rand(3), torch.rand(3))
    )

    def gradient(*inputs):
        y = ops.snake(*inputs, log_scale=True)
        return torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (x, alpha, beta), fast_mode=True)

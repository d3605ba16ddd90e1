"""Penalties against the formula written out, and their derivatives by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck

from aigc_fast import ops
from aigc_fast.models.gan import DCGANDiscriminator
from aigc_fast.training import gradient_penalty, path_length_penalty, r1_penalty


def quadratic(x, labels=None):
    """dD/dx = 2 x at every sample."""
    y = x.flatten(1).square().sum(1, keepdim=True)
    return y if labels is None else y + labels[:, None]


def test_r1_is_half_the_mean_square():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = (2 * x).flatten(1).square().sum(1).mean() / 2
    torch.testing.assert_close(r1_penalty(quadratic, x), expected)
    torch.testing.assert_close(r1_penalty(quadratic, x, torch.arange(3.0)), expected)


def test_gradient_penalty_lies_between_the_samples():
    real, fake = torch.full((1000, 1), 2.0), torch.full((1000, 1), 1.0)
    seeded = torch.Generator().manual_seed(0)
    penalty = gradient_penalty(quadratic, real, fake, target=0.0, generator=seeded)
    # E[(2 x)^2], x uniform in [1, 2]
    assert penalty.item() == pytest.approx(4 * 7 / 3, rel=0.05)
    assert gradient_penalty(quadratic, real, real, target=4.0) == 0


def test_gradient_penalty_of_a_flat_network_has_a_gradient():
    weight = torch.zeros(4, 1, requires_grad=True)
    gradient_penalty(lambda x: x @ weight, torch.randn(3, 4), torch.randn(3, 4)).backward()
    assert weight.grad.isfinite().all()


def test_gradient_penalty_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"fake must have shape \(2, 1\)"):
        gradient_penalty(quadratic, torch.ones(2, 1), torch.ones(3, 1))


@pytest.mark.parametrize("norm", ["instance", "layer", None])
def test_second_derivatives_of_a_critic(norm):
    """The gradient of r1 by the weights is a double backward of every layer."""
    critic = DCGANDiscriminator(28, 1, channels=2, norm=norm).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in critic.parameters()]
    names = [name for name, _ in critic.named_parameters()]

    def judge(x, *weights):
        return torch.func.functional_call(critic, dict(zip(names, weights, strict=True)), (x,))

    assert gradgradcheck(judge, (x, *weights), fast_mode=True)


def test_no_zeros_go_through_a_piecewise_linear_network():
    """Its penalty has no gradient with respect to activations; biases get the zero of torch."""
    w, b, head = torch.randn(4, 2, 3, 3), torch.randn(4), torch.randn(4, 4, 3, 3)
    fir, image = torch.tensor([0.25, 0.75]), torch.randn(2, 2, 8, 8)
    seen: list[torch.Tensor | None] = []

    def grads(function):
        parameters = [p.clone().requires_grad_() for p in (w, b, head)]

        def judge(x):
            y = F.conv2d(x, parameters[0])
            y.register_hook(seen.append)
            return F.conv2d(function(y, parameters[1]), parameters[2]).flatten(1)

        r1 = r1_penalty(judge, image)
        seen.clear()  # the gradient by the image
        return torch.autograd.grad(r1, parameters)

    def plain(y, bias):
        y = F.leaky_relu(y + bias[:, None, None], 0.2)
        return ops.upfirdn2d(y, fir)

    def wide(y, bias):
        return ops.upfirdn2d(ops.bias_act(y, bias, act="lrelu", gain=1.0), fir)

    def filtered(y, bias):
        return ops.filtered_lrelu(y, None, fir, bias, gain=1.0)

    expected = grads(plain)
    for function in (wide, filtered):
        torch.testing.assert_close(grads(function), expected)
        assert all(g is None for g in seen)


def test_path_length_follows_its_mean():
    latents = torch.randn(64, 5, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(5, 2 * 4 * 4, bias=False).double()
    mean = torch.zeros((), dtype=torch.float64)
    for _ in range(200):
        images = layer(latents).view(64, 2, 4, 4)
        penalty = path_length_penalty(images, latents, mean, decay=0.1)
    # |J^T y| of y standard normal / 4: about the norm of J / 4.
    assert mean.item() == pytest.approx(layer.weight.norm().item() / 4, rel=0.1)
    assert penalty < 0.2 * mean**2
    penalty.backward()
    assert layer.weight.grad.abs().sum() > 0

"""spectral_norm of a model against torch.nn.utils.spectral_norm of each of its layers."""

import copy

import pytest
import torch
from torch import nn

from aigc_fast.nn import remove_spectral_norm, spectral_norm


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.LeakyReLU(0.2), nn.ConvTranspose2d(6, 4, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 1, bias=False),
    ).double()  # fmt: skip


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    theirs = plain_model()
    ours = spectral_norm(copy.deepcopy(theirs))
    for layer in theirs:
        if hasattr(layer, "weight"):
            nn.utils.spectral_norm(layer)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def assert_same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_two_calls_before_backward_are_torchs() -> None:
    ours, theirs = pair()
    real, fake = images(), images()

    def step(model):
        loss = (1 - model(real)).relu().mean() + (1 + model(fake)).relu().mean()
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    for a, b in zip(step(ours), step(theirs), strict=True):
        assert_same(a, b)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert_same(a, b)
    theirs.load_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    before = copy.deepcopy(ours.state_dict())
    assert_same(ours(real), theirs(real))
    for name, value in ours.state_dict().items():  # evaluation iterates nothing
        assert torch.equal(value, before[name])


def test_gradient_penalty_is_torchs() -> None:
    ours, theirs = pair()
    ours.eval(), theirs.eval()
    x = images()

    def penalty(model):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        loss = (g.flatten(1).norm(dim=1) - 1).square().mean()
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True,
                                    allow_unused=True)  # fmt: skip
        first = [g for g in first if g is not None]
        weights = [p for n, p in model.named_parameters() if "weight" in n]
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        return [loss, *first, *second]

    for a, b in zip(penalty(ours), penalty(theirs), strict=True):
        assert_same(a, b)


def test_singular_values_go_to_one_and_removal_keeps_the_function() -> None:
    model = spectral_norm(plain_model(), n_power_iterations=30)
    x = images()
    model(x)
    model.eval()
    y = model(x)
    for layer in (model[0], model[5], model[7]):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert 1 - 1e-9 < largest < 1.001  # sigma is approached from below
    keys = plain_model().state_dict().keys()
    assert remove_spectral_norm(model).state_dict().keys() == keys
    assert_same(model(x), y)
    assert model[0].weight.is_leaf and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="model must be one that spectral_norm returned"):
        remove_spectral_norm(model)


def test_compiles_without_a_graph_break() -> None:
    model = spectral_norm(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))).eval()
    x = torch.randn(2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="model must have linear or convolutional"):
        spectral_norm(nn.Sequential(nn.ReLU()))
    model = spectral_norm(plain_model())
    with pytest.raises(ValueError, match="model must have plain weights"):
        spectral_norm(model)

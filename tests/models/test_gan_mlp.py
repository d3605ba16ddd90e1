"""The MLP GAN against the plain torch sequence of the same weights."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from aigc_fast.models.gan import MLPDiscriminator, MLPGenerator


def plain(sizes, last):
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1], *last)


PAIRS = {
    "generator": (MLPGenerator, plain((100, 256, 512, 1024, 784), [nn.Tanh()])),
    "discriminator": (MLPDiscriminator, plain((784, 1024, 512, 256, 1), [])),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    make, theirs = PAIRS[request.param]
    return make().double(), theirs.double()


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_weights_travel_in_both_directions(pair):
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_outputs_gradients_and_gradients_of_gradients_are_the_same(pair):
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, ours[0].in_features, dtype=torch.float64)

    def derivatives(model):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        first = torch.autograd.grad(y.sum(), [leaf, *model.parameters()], create_graph=True)
        penalty = first[0].square().sum()  # as R1 has it
        second = torch.autograd.grad(penalty, [*model.parameters()][::2], allow_unused=True)
        return [y, *first], second

    (our_first, our_second), (their_first, their_second) = derivatives(ours), derivatives(theirs)
    for a, b in zip([*our_first, *our_second], [*their_first, *their_second], strict=True):
        assert_same(a, b)


def test_compiles_without_a_graph_break(pair):
    ours, _ = pair
    x = torch.randn(3, ours[0].in_features, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True)(x), ours(x))

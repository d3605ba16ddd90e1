"""The strided convolution that is a product of matrices."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.nn import Conv2dBiasAct
from aigc_fast.nn import conv_bias_act as layers
from aigc_fast.ops._strided_product import strided_product
from aigc_fast.ops._winograd import are_faster
from tests.op_samples import channels_last, rand
from tests.ops.test_every_op import assert_as_good_as_torch

CALLS = [  # size of the map, kernel, stride, padding
    ((8, 6), 4, 2, (1, 1)),
    ((7, 9), 4, 2, (1, 1)),
    ((5, 8), 4, 2, (0, 3)),
    ((3, 3), 4, 2, (1, 1)),
    ((7, 10), 6, 2, (2, 1)),
    ((9, 7), 3, 3, (0, 1)),
    ((4, 4), 2, 2, (0, 0)),
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CALLS)
def test_is_the_convolution(size, kernel, stride, padding) -> None:
    """Values, gradients and the gradients of these."""
    x, weight = channels_last(rand(3, 5, *size)), channels_last(rand(7, 5, kernel, kernel))
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    found = []
    for function in (strided_product, lambda x, w, s, p: F.conv2d(x, w, None, s, p)):
        y = function(x, weight, stride, padding)
        gradients = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
        found.append([y, *gradients, *second])
    torch.testing.assert_close(*found)
    assert y.shape == found[0][0].shape
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_as_exact_as_the_convolution(dtype) -> None:
    x, weight = channels_last(rand(2, 32, 8, 8)), channels_last(rand(24, 32, 4, 4))

    def run(function, kind):
        inputs = [t.to(dtype).to(kind).requires_grad_() for t in (x, weight)]
        y = function(*inputs)
        upstream = rand(*y.shape, seed=1).to(dtype).to(kind)
        return [y, *torch.autograd.grad(y, inputs, upstream)]

    ours = run(lambda x, w: strided_product(x, w, 2, (1, 1)), dtype)
    plain = run(lambda x, w: F.conv2d(x, w, None, 2, 1), dtype)
    exact = run(lambda x, w: F.conv2d(x, w, None, 2, 1), torch.float64)
    assert_as_good_as_torch(ours, plain, exact, dtype)


def test_layer_takes_it_where_it_can(monkeypatch) -> None:
    taken = []

    def spy(*args):
        taken.append(True)
        return strided_product(*args)

    monkeypatch.setattr(layers, "strided_product", spy)
    last = {"memory_format": torch.channels_last}
    for options, size, layout, takes in (
        ({"padding": 2}, 8, last, True),
        ({"padding": 2}, 8, {}, False),
        ({}, 8, last, not are_faster()),  # for which conv2d has products of its own
        ({}, 128, last, False),  # more outputs than products in each
        ({"groups": 2}, 8, last, False),
        ({"dilation": 2}, 8, last, False),
        ({"padding_mode": "reflect"}, 8, last, False),
        ({"stride": 3}, 8, last, False),
        ({"out_channels": 8}, 8, last, False),
    ):
        options = {"out_channels": 256, "stride": 2, "padding": 1, "act": "lrelu"} | options
        layer = Conv2dBiasAct(256, kernel_size=4, gain=1.0, **options).double().to(**layout)
        x = rand(1, 256, size, size).to(**layout)
        taken.clear()
        want = F.leaky_relu(layer._conv_forward(x, layer.weight, layer.bias), 0.2)
        torch.testing.assert_close(layer(x), want)
        assert bool(taken) == takes
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x.float()).dtype == torch.bfloat16

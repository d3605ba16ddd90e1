"""Gradients of ops.conv1d and ops.conv_transpose1d, of sizes at which numeric ones would take
too long: they are those of the chain of torch's operations."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.conv1d import innermost, weight
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch, recorded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def torchs(x, weight, bias, *residuals, transposed=False, slope=1.0, gain=1.0, **how):
    function = F.conv_transpose1d if transposed else F.conv1d
    y = function(F.leaky_relu(x, slope), weight, bias, **how)
    return sum(residuals, y) * gain


def ours(x, weight, bias, *residuals, transposed=False, **how):
    if transposed:
        return ops.conv_transpose1d(x, weight, bias, **how)
    return ops.conv1d(x, weight, bias, residuals, **how)


TRANSPOSED = {"transposed": True}
#: (batch, channels, steps) of x, outputs, taps, and how. On a CPU sums run over 128 steps at a
#: time, of blocks of 12 channels by groups of 32 or 16; parts of the time begin at 2**21 products.
CASES = {
    "many_parts": ((2, 32, 1500), 32, 7, {"padding": 9, "dilation": 3, "slope": 0.1}),
    "groups": ((1, 40, 300), 100, 3, {"padding": 1, "slope": 0.2, "gain": 1 / 3}),
    "deep": ((1, 300, 150), 40, 5, {"padding": 2}),
    "few_outputs": ((1, 32, 900), 1, 7, {"padding": 3, "slope": 0.01}),
    "few_inputs": ((3, 2, 400), 70, 3, {}),
    "half_a_group": ((2, 17, 513), 16, 4, {"padding": 2, "slope": 0.0}),
    "far_apart": ((1, 24, 260), 24, 3, {"padding": 200, "dilation": 150, "slope": 0.1}),
    "beyond": ((1, 24, 200), 24, 3, {"padding": 300, "dilation": 7}),
    "strided": ((2, 32, 900), 64, 16, {"stride": 8, "padding": 4, "slope": 0.1}),
    "strided_rest": ((2, 20, 302), 35, 5, {"stride": 3, "padding": 1, "dilation": 2}),
    "steps_unread": ((1, 16, 500), 20, 2, {"stride": 9}),
    "transposed": ((2, 64, 150), 32, 8, {"stride": 4, "padding": 2, "slope": 0.1, **TRANSPOSED}),
    "transposed_few": ((1, 32, 300), 2, 16, {"stride": 8, "padding": 4, **TRANSPOSED}),
    "transposed_gaps": ((1, 16, 140), 48, 2, {"stride": 5, "output_padding": 3, **TRANSPOSED}),
    "transposed_apart": ((2, 20, 130), 20, 5, {"stride": 6, "dilation": 4, **TRANSPOSED}),
}
ONE_OF_EACH = ["half_a_group", "strided_rest", "transposed_apart"]


def case_of(name: str, dtype: torch.dtype) -> tuple:
    """Ours, torch's, and their tensors: x, weight, bias and, of a convolution, two residuals."""
    shape, out, taps, how = CASES[name]
    transposed = how.get("transposed", False)
    sizes = (shape[1], out) if transposed else (out, shape[1])
    tensors = [innermost(rand(*shape)), weight(*sizes, taps), rand(out, seed=2)]
    if not transposed:
        y = torchs(*tensors, **how)
        tensors += [innermost(rand(*y.shape, seed=3)), rand(*y.shape, seed=4)]
    return partial(ours, **how), partial(torchs, **how), [t.to(dtype) for t in tensors]


def derivatives(function, tensors: list[Tensor]) -> list[Tensor]:
    """y, its gradients, and theirs of a sum of squares."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    y = function(*inputs)
    upstream = rand(*y.shape, seed=7).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
    penalty = sum(g.square().mean() for g in first[:2])
    return [y, *first, *torch.autograd.grad(penalty, [*inputs[:2], upstream])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_torchs(name, dtype) -> None:
    function, chain, low = case_of(name, dtype)
    exact = derivatives(chain, [t.double() for t in low])
    plain = derivatives(chain, low)
    with recorded() as calls:
        mine = derivatives(function, low)
    if dtype is torch.float64:  # which has no better reference than itself
        torch.testing.assert_close(mine, plain)
    else:
        assert_as_good_as_torch(mine, plain, exact, dtype)
    names = [op.name for op, _ in calls]
    assert names.count("conv1d_backward_weight") == 2
    assert set(names) == {"conv1d", "conv_transpose1d", "conv1d_backward_weight"}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("wanted", range(4), ids=["x", "weight", "bias", "residual"])
def test_one_gradient_alone(wanted, name) -> None:
    function, chain, tensors = case_of(name, torch.float64)
    if wanted == len(tensors):
        pytest.skip("it adds no residual")
    tensors[wanted].requires_grad_()
    with recorded() as calls:
        (mine,) = torch.autograd.grad(function(*tensors).sum(), tensors[wanted])
    (plain,) = torch.autograd.grad(chain(*tensors).sum(), tensors[wanted])
    torch.testing.assert_close(mine, plain)
    assert len(calls) == (2 if wanted < 2 else 1)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_third_derivative(name) -> None:
    results = []
    for function in case_of(name, torch.float64)[:2]:
        x, weight, bias, *_ = (t.requires_grad_() for t in case_of(name, torch.float64)[2])
        y = function(x, weight, bias)
        (first,) = torch.autograd.grad(y.pow(3).mean(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).mean(), weight, create_graph=True)
        results.append(torch.autograd.grad(second.pow(2).mean(), [x, weight]))
    torch.testing.assert_close(*results)


def test_any_strides_of_x_and_the_gradient() -> None:
    kernel = weight(20, 18, 3).requires_grad_()
    x = rand(4, 18, 60)
    views = (
        x,
        innermost(x),
        x[:, :, ::2],
        x[..., 3:],
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        x[:1, :, :1].expand(4, 18, 60),
    )
    for view in views:
        leaf = view.detach().requires_grad_()
        shape = (4, 20, view.shape[2])
        for upstream in (
            rand(*shape),
            innermost(rand(*shape)),
            rand(1).expand(shape),
            rand(*shape[::-1]).permute(2, 1, 0),
        ):
            y = ours(leaf, kernel, None, padding=1, slope=0.1)
            plain = torchs(leaf, kernel, None, padding=1, slope=0.1)
            mine = torch.autograd.grad(y, [leaf, kernel], upstream)
            torch.testing.assert_close(mine, torch.autograd.grad(plain, [leaf, kernel], upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "out", "taps"),
    [((1, 32, 20000), 32, 7), ((1, 512, 150), 512, 3), ((6, 16, 3000), 1, 7)],
    ids=["long", "wide", "few_outputs"],
)
def test_the_same_bits_for_any_number_of_threads(shape, out, taps, dtype) -> None:
    x, kernel = innermost(rand(*shape)).to(dtype), weight(out, shape[1], taps).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (x, kernel)]
            y = ours(*leaves, None, padding=3, slope=0.1)
            results.append([y, *torch.autograd.grad(y, leaves, y.detach())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_does_not_exist_is_not_multiplied(dtype) -> None:
    """Zeros around x times an infinite gradient would be NaN."""
    backward = importlib.import_module("aigc_fast.ops._conv1d").conv1d_backward_weight
    x = torch.ones(1, 5, 9, dtype=dtype)
    grad = torch.ones(1, 3, 9, dtype=dtype)
    grad[0, 1, 0] = torch.inf
    by_weight = backward(grad, x, 3, 1, 1, 1, 1.0, 1.0)
    expected = torch.tensor([8.0, 9.0, 8.0]).expand(3, 5, 3).clone()
    expected[1, :, 1:] = torch.inf
    assert by_weight.float().equal(expected)


def test_gradients_keep_channels_innermost() -> None:
    """So that a backward pass through many reorders nothing."""
    orders = []
    x = innermost(rand(1, 16, 50)).requires_grad_()
    y = ours(ours(x, weight(24, 16, 3), None), weight(24, 8, 4), None, transposed=True)
    with recorded() as calls:
        y.backward(innermost(torch.ones_like(y)))
    for _, args in calls:
        orders += (
            [args[0].stride(1), args[1].stride(1)] if args[1].shape[0] == 1 else [args[0].stride(1)]
        )
    assert orders == [1] * len(orders) and len(calls) == 2
    assert x.grad is not None and x.grad.stride(1) == 1

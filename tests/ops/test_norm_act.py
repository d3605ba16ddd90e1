"""What the table of samples does not say of the norms with an activation."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops._activations import ACTIVATIONS
from tests.op_samples import channels_last, rand
from tests.ops.test_every_op import DEVICE, assert_as_good_as_torch


def torchs(x, weight, bias, act):
    # By hand: the third derivative of torch's own batch_norm is wrong (2.13).
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - mean) * (var + 1e-5).rsqrt() * weight.view(shape) + bias.view(shape)
    return F.silu(y) if act == "swish" else F.leaky_relu(y, 0.2)


def ours(x, weight, bias, act):
    return ops.batch_norm_act(x, None, None, weight, bias, True, 0.1, 1e-5, act)


def variables(*shape: int) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in (rand(*shape), rand(shape[1]), rand(shape[1], seed=1))]


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_three_derivatives_are_those_of_torch(act) -> None:
    inputs = variables(3, 4, 5)
    results = []
    for f in (ours, torchs):
        grads = [f(*inputs, act)]
        found = []
        for order in range(3):
            scalar = sum((g * rand(*g.shape, seed=order)).sin().sum() for g in grads)
            grads = torch.autograd.grad(scalar, inputs, create_graph=True)
            found.append(grads)
        results.append(found)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_double_backward_of_some_gradients(used) -> None:
    inputs = variables(3, 4, 5)
    results = []
    for f in (ours, torchs):
        first = torch.autograd.grad(f(*inputs, "swish").pow(2).sum(), inputs, create_graph=True)
        total = sum(first[i].pow(2).sum() for i in used)
        results.append(torch.autograd.grad(total, inputs, allow_unused=True))
    torch.testing.assert_close(*results)


def twice(f, inputs) -> list[torch.Tensor]:
    """Output, gradients, and the gradients of a product with them."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = f(*inputs)
    dy = rand(*y.shape, seed=3).bfloat16().to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    upstream = [rand(*g.shape, seed=4).bfloat16().to(g.dtype) for g in first]
    second = torch.autograd.grad(first, [*inputs, dy], upstream, allow_unused=True)
    return [y, *first, *(g for g in second if g is not None)]


def assert_within_the_rule(f, inputs) -> None:
    inputs = [t.float() for t in inputs]
    with aigc_fast.backend("reference"):
        exact, plain = twice(f, [t.double() for t in inputs]), twice(f, inputs)
    assert_as_good_as_torch(twice(f, inputs), plain, exact, torch.float32)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_double_backward_of_every_activation(act) -> None:
    assert_within_the_rule(lambda *inputs: ours(*inputs, act), variables(4, 8, 6, 6))


@pytest.mark.parametrize(
    "x",
    [rand(2, 2, 200, 190), channels_last(rand(2, 5, 60, 120)), rand(2100, 40)],
    ids=["long_channels", "channels_last", "matrix"],
)
@pytest.mark.parametrize("f", [ops.batch_norm_act, ops.pixel_norm_act], ids=lambda f: f.__name__)
def test_norms_that_are_cut_into_pieces(f, x) -> None:
    if f is ops.pixel_norm_act:
        assert_within_the_rule(lambda x: f(x, act="lrelu"), [x])
    else:
        assert_within_the_rule(lambda x: f(x, training=True, act="lrelu"), [x])


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_may_be_wider_than_x(parameters) -> None:
    x = rand(4, 3, 5, 5).bfloat16().requires_grad_()
    weight, bias = (rand(3, seed=i).to(parameters).requires_grad_() for i in (1, 2))
    mean, var = torch.zeros(3), torch.ones(3)
    y = ops.batch_norm_act(x, mean, var, weight, bias, True, act="lrelu")
    want = torchs(x.float(), weight.float(), bias.float(), "lrelu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=8e-3, atol=1e-6)
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, parameters, parameters]
    torch.testing.assert_close(mean, 0.1 * x.detach().float().mean((0, 2, 3)))


def test_keeps_channels_last_and_a_large_mean_costs_no_digits() -> None:
    x = channels_last(rand(2, 5, 6, 7)) + 4096
    y = ops.batch_norm_act(x.float(), training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = F.batch_norm(x.float().double(), None, None, training=True)
    assert (y - exact).abs().max() < 1e-3  # fp32 has 2.4e-4 of x left
    for t in (x, x.contiguous()):
        mean, var = torch.zeros(5), torch.zeros(5)
        ops.batch_norm_act(t.float(), mean, var, training=True, momentum=1.0)
        torch.testing.assert_close(
            var.double(), t.float().double().var((0, 2, 3)), rtol=1e-5, atol=0
        )


def test_instance_norm_is_that_of_torch_and_a_style_modulates_it() -> None:
    x, weight, bias = variables(3, 4, 5, 2)
    want = F.instance_norm(x, None, None, weight, bias)
    torch.testing.assert_close(ops.instance_norm_act(x, weight, bias), want)
    scale, shift = rand(2, 3, 4)
    want = F.instance_norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(ops.adaptive_instance_norm(x, scale, shift), want)


@pytest.mark.gpu
def test_triton_sums_in_several_parts(monkeypatch) -> None:
    from aigc_fast.kernels import norm_tiles

    monkeypatch.setattr(norm_tiles, "_TILE", 16)
    for x in (rand(2, 3, 7, 4) + 100, channels_last(rand(2, 3, 7, 4) + 100)):
        inputs = [t.float().to(DEVICE) for t in (x, rand(3), rand(3, seed=1))]
        results = []
        for backend in ("triton", "reference"):
            with aigc_fast.backend(backend):
                results.append(twice(lambda *inputs: ours(*inputs, "swish"), inputs))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)

"""What the table of samples does not say of batch_norm_act."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples import channels_last, rand


def torchs(x, weight, bias, act):
    # By hand: the third derivative of torch's own batch_norm is wrong (2.13).
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - mean) * (var + 1e-5).rsqrt() * weight.view(shape) + bias.view(shape)
    return F.silu(y) if act == "swish" else F.leaky_relu(y, 0.2)


def ours(x, weight, bias, act):
    return ops.batch_norm_act(x, None, None, weight, bias, True, 0.1, 1e-5, act)


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_three_derivatives_are_those_of_torch(act) -> None:
    inputs = [rand(3, 4, 5).requires_grad_(), rand(4).requires_grad_(), rand(4).requires_grad_()]
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
    inputs = [rand(3, 4, 5).requires_grad_(), rand(4).requires_grad_(), rand(4).requires_grad_()]
    results = []
    for f in (ours, torchs):
        first = torch.autograd.grad(f(*inputs, "swish").pow(2).sum(), inputs, create_graph=True)
        total = sum(first[i].pow(2).sum() for i in used)
        results.append(torch.autograd.grad(total, inputs, allow_unused=True))
    torch.testing.assert_close(*results)


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
    x = channels_last(rand(4, 5, 6, 7)) + 4096
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


def test_triton_sums_in_several_parts(monkeypatch) -> None:
    from aigc_fast.kernels import batch_norm_act as kernels

    import aigc_fast

    monkeypatch.setattr(kernels, "_TILE", 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (rand(3, 5, 7, 4) + 100).float().to(device).contiguous(memory_format=layout)
        results = []
        for backend in ("triton", "reference"):
            inputs = [x.clone().requires_grad_(), *(rand(5).float().to(device).requires_grad_() for _ in "wb")]  # fmt: skip  # noqa: E501
            with aigc_fast.backend(backend):
                first = torch.autograd.grad(
                    ours(*inputs, "swish").square().sum(), inputs, create_graph=True
                )
                second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            results.append((first, second))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)

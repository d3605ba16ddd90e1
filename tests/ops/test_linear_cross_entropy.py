"""Cross-entropy against torch's own, and what the logits' chunks must not change."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import ops
from aigc_fast.ops._registry import OPS
from tests.op_samples.cross_entropy import targets
from tests.op_samples.sample import rand

MODULE = importlib.import_module("aigc_fast.ops.linear_cross_entropy")
REDUCTIONS = ("mean", "sum", "none")


def case(dtype: torch.dtype = torch.float32, rows: int = 50) -> tuple[list[Tensor], Tensor]:
    """([input, weight, bias], target)"""
    parameters = [rand(rows, 12), rand(40, 12, seed=1), rand(40, seed=2)]
    return [p.to(dtype).requires_grad_() for p in parameters], targets(rows, classes=40)


def run(parameters: list[Tensor], target: Tensor, **options) -> list[Tensor]:
    """[loss, *gradients]"""
    x, weight, bias = parameters
    loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)
    return [loss, *torch.autograd.grad((loss * 3).sum(), parameters)]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_agrees_with_torch(reduction, smoothing) -> None:
    parameters, target = case(torch.float64)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    x, weight, bias = parameters
    loss = F.cross_entropy(F.linear(x, weight, bias), target, **options)
    expected = [loss, *torch.autograd.grad((loss * 3).sum(), parameters)]
    torch.testing.assert_close(run(parameters, target, **options), expected)
    logits = F.linear(x, weight, bias)
    torch.testing.assert_close(ops.cross_entropy(logits, target, **options), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunks_change_nothing_but_rounding(monkeypatch, reduction, dtype) -> None:
    parameters, target = case(dtype)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    exact = run(wide, target, reduction=reduction)
    whole = run(parameters, target, reduction=reduction)
    monkeypatch.setattr(MODULE, "_LEAST_ROWS", 7)  # then 12 rows at a time
    parts = run(parameters, target, reduction=reduction)
    for one, other, truth in zip(whole, parts, exact, strict=True):
        error, allowed = (other - truth).abs().max(), (one - truth).abs().max()
        assert error <= 1.5 * allowed + torch.finfo(one.dtype).eps * truth.abs().max()


def test_logits_take_no_more_memory_than_the_weight(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "_LEAST_ROWS", 7)
    seen = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        seen.append(y.numel())
        return y

    monkeypatch.setattr(MODULE, "linear", linear)
    parameters, target = case(rows=100)
    run(parameters, target)
    assert max(seen) == parameters[1].numel()


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_parameter_costs_and_gets_nothing(frozen) -> None:
    parameters, target = case()
    expected = run(parameters, target)
    parameters[frozen].requires_grad_(False)
    x, weight, bias = parameters
    ops.linear_cross_entropy(x, weight, target, linear_bias=bias).mul(3).backward()
    for i, parameter in enumerate(parameters):
        if i == frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[1 + i])


def test_backward_as_often_as_one_likes() -> None:
    """What it hands out is the caller's own, to be added to, cleared or overwritten."""
    parameters, target = case()
    x, weight, bias = parameters
    loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close([p.grad for p in parameters], [times * g for g in kept])
    for p in parameters:
        p.grad.zero_()
    loss.backward()
    torch.testing.assert_close([p.grad for p in parameters], kept)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_that_the_input_comes_from_counts_once(reduction) -> None:
    """Tied embeddings; under create_graph too, and in the gradient of that gradient."""
    weight = rand(13, 5).requires_grad_()
    ids, target = targets(9, classes=13, ignored=0), targets(9, classes=13)

    def gradients(loss_of, create_graph: bool) -> list[Tensor]:
        loss = loss_of(weight[ids].tanh(), weight).sum()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=create_graph)
        if not create_graph:
            return [grad]
        return [grad, *torch.autograd.grad(grad.square().sum(), weight)]

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target, reduction=reduction)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, w, target, reduction=reduction)

    for create_graph in (False, True):
        torch.testing.assert_close(gradients(ours, create_graph), gradients(plain, create_graph))


def test_float16_gradients_survive_a_small_mean() -> None:
    """1 / rows of a gradient is beyond float16's range until the scaler's factor comes in."""
    rows, factor = 4096, 2.0**14
    x, weight = rand(rows, 8, scale=1e-3).half(), rand(64, 8).half()
    target, grads = targets(rows, classes=64), []
    for dtype in (torch.float16, torch.float64):
        leaf = x.detach().to(dtype).clone().requires_grad_()
        (ops.linear_cross_entropy(leaf, weight.to(dtype), target) * factor).backward()
        grads.append(leaf.grad.double())
    assert (grads[0] - grads[1]).norm() < 2e-3 * grads[1].norm()


def test_autocast() -> None:
    """As of a product: 16-bit logits, a float32 loss, gradients in the parameters' dtypes."""
    parameters, target = case()
    with torch.autocast("cpu", torch.bfloat16):
        under = run(parameters, target)
    narrow = run([p.detach().bfloat16().requires_grad_() for p in parameters], target)
    assert all(t.dtype == torch.float32 for t in under)
    torch.testing.assert_close(under, [t.float() for t in narrow], rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole(reduction) -> None:
    parameters, target = case()
    compiled = torch.compile(
        lambda x, w, b: ops.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction),
        fullgraph=True,
        backend="aot_eager",
    )
    loss = compiled(*parameters)
    found = [loss, *torch.autograd.grad((loss * 3).sum(), parameters)]
    torch.testing.assert_close(found, run(parameters, target, reduction=reduction))


def test_a_perfect_row_has_no_loss_and_no_gradient() -> None:
    logits = torch.full((1, 1000), -200.0).requires_grad_()
    target = torch.tensor([123])
    with torch.no_grad():
        logits[0, 123] = 200
    loss = ops.cross_entropy(logits, target)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_autocast_leaves_float64_alone() -> None:
    parameters, target = case(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(parameters, target)
    torch.testing.assert_close(under, run(parameters, target), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_gradient_takes_no_strided_place(backend) -> None:
    logits, target = rand(3, 8).float()[:, :5], torch.tensor([0, 4, 2])
    args = torch.ones(3), logits, target, torch.ones(3), -100, 0.0, 0.0, 0.0
    with pytest.raises(ValueError, match="input must be contiguous"):
        OPS["cross_entropy_backward_"].call(backend, *args)

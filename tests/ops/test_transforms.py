"""torch.func and forward-mode derivatives of every operator: those of backward."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops._winograd import are_faster
from tests.ops.test_every_op import (
    CALLS,
    DIFFERENTIABLE,
    cast,
    contiguous_grad,
    map_tensors,
    tensors,
    variables,
)


@pytest.fixture(autouse=True)
def not_strict(monkeypatch) -> None:
    monkeypatch.delenv("AIGC_FAST_STRICT", raising=False)


def floats_of(op, args, kwargs, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The floating outputs of a call with these in place of its variables."""
    instead = dict(zip(map(id, variables(op, args, kwargs)), given, strict=True))
    args, kwargs = map_tensors((args, kwargs), lambda t: instead.get(id(t), t))
    return [t for t in tensors(op.function(*args, **kwargs)) if t.is_floating_point()]


# Running statistics move in place, which torch.func refuses of torch's own batch norm too.
# `vector_quantize` has derivatives of its own, below.
NOT_HERE = ("batch_norm_act_running", "vector_quantize")


@pytest.mark.parametrize(
    ("op", "sample"), [c for c in DIFFERENTIABLE if not c.id.startswith(NOT_HERE)]
)
def test_derivatives_are_those_of_backward(op, sample) -> None:
    args, kwargs = cast((sample.args, sample.kwargs), torch.float64)
    inputs = tuple(variables(op, args, kwargs))
    tangents = tuple(contiguous_grad(t, 50 + i) for i, t in enumerate(inputs))

    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    outputs = floats_of(op, args, kwargs, leaves)
    known = [i for i, t in enumerate(outputs) if t.requires_grad]
    upstream = [contiguous_grad(outputs[i], i) for i in known]
    grads = torch.autograd.grad([outputs[i] for i in known], leaves, upstream, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
    values = [outputs[i].detach() for i in known]

    def chosen(*given: Tensor) -> list[Tensor]:
        outputs = floats_of(op, args, kwargs, given)
        return [outputs[i] for i in known]

    again, pull = torch.func.vjp(chosen, *inputs)
    torch.testing.assert_close(again, values)
    torch.testing.assert_close(list(pull(upstream)), grads)

    with forward_ad.dual_level():
        duals = chosen(*map(forward_ad.make_dual, inputs, tangents))
        pushed = [forward_ad.unpack_dual(t).tangent for t in duals]
    pushed = [torch.zeros_like(t) if p is None else p for p, t in zip(pushed, values, strict=True)]
    forward = sum((p * u).sum() for p, u in zip(pushed, upstream, strict=True))
    backward = sum((g * v).sum() for g, v in zip(grads, tangents, strict=True))
    size = sum((p * u).abs().sum() for p, u in zip(pushed, upstream, strict=True))
    torch.testing.assert_close(forward, backward, rtol=0, atol=float(size) * 1e-9 + 1e-12)
    assert any(p.any() for p in pushed) == any(g.any() for g in grads)


def test_straight_through_derivatives() -> None:
    x, codes = torch.randn(2, 3, 5).double(), torch.randn(4, 3).double()

    def quantize(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, distances = ops.vector_quantize(x, codes, dim=1, beta=0.25)
        return quantized, distances

    leaves = x.clone().requires_grad_(), codes.clone().requires_grad_()
    outputs = quantize(*leaves)
    upstream = tuple(torch.randn_like(t) for t in outputs)
    grads = torch.autograd.grad(outputs, leaves, upstream)
    again, pull = torch.func.vjp(quantize, x, codes)
    torch.testing.assert_close(again, tuple(t.detach() for t in outputs))
    torch.testing.assert_close(pull(upstream), grads)
    tangents = torch.randn_like(x), torch.randn_like(codes)
    _, pushed = torch.func.jvp(quantize, (x, codes), tangents)
    forward = sum((p * u).sum() for p, u in zip(pushed, upstream, strict=True))
    backward = sum((g * v).sum() for g, v in zip(grads, tangents, strict=True))
    torch.testing.assert_close(forward, backward)


def test_gradients_of_many_samples_at_once() -> None:
    weight, x = torch.randn(16), torch.randn(5, 3, 16)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return ops.rms_norm(x, weight).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    one_by_one = [torch.func.grad(loss)(weight, sample) for sample in x]
    torch.testing.assert_close(found, torch.stack(one_by_one))


@pytest.mark.parametrize(
    ("op", "sample"),
    [
        c
        for c in CALLS
        if not (
            c.values[0].mutates or c.id in ("batch_norm_act-running", "vector_quantize-special")
        )
    ],
)
def test_maps_over_any_argument(op, sample) -> None:
    """As an ensemble of models does over one input, and a model over inputs one by one."""
    args, kwargs = cast((sample.args, sample.kwargs), torch.float64)
    given = [t for t in tensors((args, kwargs)) if t.dtype == torch.float64]

    def run(*some: Tensor, at: list[int]) -> tuple[Tensor, ...]:
        instead = {id(given[i]): t for i, t in zip(at, some, strict=True)}
        found = map_tensors((args, kwargs), lambda t: instead.get(id(t), t))
        return tuple(tensors(op.function(*found[0], **found[1])))

    each_and_all = [[i] for i in range(len(given))] + [list(range(len(given)))]
    for at in filter(None, each_and_all):
        batches = [torch.stack([given[i], given[i] / 2]) for i in at]
        found = torch.func.vmap(partial(run, at=at))(*batches)
        each = [run(*row, at=at) for row in zip(*batches, strict=True)]
        torch.testing.assert_close(
            found, tuple(map(torch.stack, zip(*each, strict=True))), equal_nan=True
        )


WEIGHT, IMAGES, SOUNDS = torch.randn(16, 16, 3, 3), torch.randn(2, 16, 16, 16), torch.randn(2, 4, 9)
ROW = torch.tensor([1.0, 0.5, 1.0, 0.3, 0.4, 0.5, 0.1, 0.2])


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: ops.conv2d(x, WEIGHT, padding=1), IMAGES),
        (lambda x: ops.conv_transpose2d(x, WEIGHT, padding=1), IMAGES),
        (lambda x: ops.conv_transpose1d(x, WEIGHT[0, :4, :2]), SOUNDS),
        (lambda x: ops.scheduler_step(x, x.cos(), ROW, history=[x * 2]), SOUNDS),
        (lambda x: ops.spectral_norm([x], [torch.ones(2)], [torch.ones(36)])[0][0], SOUNDS),
    ],
)
def test_a_batch_of_gradients(function, x, monkeypatch) -> None:
    """Of operators that take lists, too; by the compiled kernels."""
    monkeypatch.setenv("AIGC_FAST_STRICT", "1")
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    upstream = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, leaf, upstream, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, leaf, grad, retain_graph=True)[0] for grad in upstream]
    assert torch.equal(found, torch.stack(each))


def test_a_batch_of_gradients_to_be_differentiated_again() -> None:
    """Where a gradient is an operator again torch would lose it."""
    leaf, weight = IMAGES.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    results = [ops.bias_act(leaf, act="tanh")]
    if are_faster():  # else it is torch's convolution
        results.append(ops.conv2d(leaf, weight, padding=1))
    for y in results:
        with pytest.raises(NotImplementedError, match="is_grads_batched=True with create_graph"):
            torch.autograd.grad(
                y, leaf, torch.ones(2, *y.shape), is_grads_batched=True, create_graph=True
            )


def test_a_kernel_that_is_forced_says_that_it_has_no_such_derivative() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    with aigc_fast.backend("cpu"), pytest.raises(RuntimeError, match="rms_norm: .* torch.func"):
        torch.func.jvp(lambda x: ops.rms_norm(x, weight), (x,), (x,))
    with aigc_fast.backend("reference"):
        torch.func.jvp(lambda x: ops.rms_norm(x, weight), (x,), (x,))


def test_strict_mode_refuses(monkeypatch) -> None:
    monkeypatch.setenv("AIGC_FAST_STRICT", "1")
    with pytest.raises(aigc_fast.FallbackError, match=r"rms_norm would run .* torch\.func"):
        torch.func.vmap(ops.rms_norm, in_dims=(0, None))(torch.randn(2, 3, 8), torch.ones(8))

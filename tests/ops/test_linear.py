"""ops.linear: torch's own results, derivatives and errors, whichever library multiplies."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import nn, ops
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch

#: Not the function, which has the module's name.
module = importlib.import_module("aigc_fast.ops.linear")
CASES = {
    "matrix": ((33, 40), (17, 40)),
    "batch": ((2, 3, 5, 24), (9, 24)),
    "row": ((64,), (32, 64)),
    "one_row": ((1, 50), (70, 50)),
    "no_rows": ((0, 8), (4, 8)),
    "long_sums": ((5, 1201), (8, 1201)),
    "batch_of_long_sums": ((2, 5, 801), (9, 801)),
    "long_sums_of_a_wide_weight": ((3, 800), (25, 800)),
}


@pytest.fixture(params=["onednn", "torch"])
def products(request, monkeypatch):
    """oneDNN for products of any size, on any processor; and how often it was asked."""
    asked = []

    def product(*args):
        asked.append(args)
        return original(*args)

    original = module._product
    monkeypatch.setattr(module, "mkl_lags", lambda: request.param == "onednn")
    monkeypatch.setattr(module, "_LEAST", 1)
    monkeypatch.setattr(module, "_ROWS", 1)
    monkeypatch.setattr(module, "_COPY", 3000)
    monkeypatch.setattr(module, "_product", product)
    asked.append(request.param)
    return asked


def derivatives(function, x, weight, bias):
    """y, its gradients, and theirs of a sum of squares."""
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*inputs)
    upstream = rand(*y.shape, seed=7).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
    penalty = sum(g.square().sum() for g in first[:2])
    return [y, *first, *torch.autograd.grad(penalty, [*inputs[:2], upstream])]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_torchs(case, dtype, with_bias, products) -> None:
    shape, kernel = CASES[case]
    bias = rand(kernel[0], seed=2).to(dtype) if with_bias else None
    low = [rand(*shape).to(dtype), rand(*kernel, seed=1).to(dtype), bias]
    exact = derivatives(F.linear, *(None if t is None else t.double() for t in low))
    plain, mine = derivatives(F.linear, *low), derivatives(ops.linear, *low)
    assert [t.shape for t in mine] == [t.shape for t in plain]
    assert_as_good_as_torch(mine, plain, exact, dtype)
    with torch.no_grad():
        assert torch.equal(ops.linear(*low), mine[0])
    expected = products[0] == "onednn" and dtype == torch.float32 and 0 not in shape
    assert (len(products) > 1) == expected


def test_any_strides(products) -> None:
    x, weight = rand(12, 20).float().t(), rand(12, 14).float().t()
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(ops.linear(x[::2], weight), F.linear(x[::2], weight))
    gaps = rand(14, 50).float()[:, :12]
    torch.testing.assert_close(ops.linear(x, gaps), F.linear(x, gaps))
    assert len(products) == (4 if products[0] == "onednn" else 1)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (rand(3, 4).float(), rand(5, 6).float(), None),
        (rand(3, 4).float(), rand(5, 4).float(), rand(6).float()),
        (rand(3, 4).float(), rand(5, 4), None),
    ],
    ids=["features", "bias", "dtype"],
)
def test_torchs_errors(x, weight, bias, products) -> None:
    with pytest.raises(RuntimeError) as torchs:
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        ops.linear(x, weight, bias)
    assert str(ours.value) == str(torchs.value)


def test_elsewhere_it_is_torchs_own(products) -> None:
    x, weight = rand(8, 16).float(), rand(4, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    marked = weight.as_subclass(type("Marked", (torch.Tensor,), {}))
    torch.testing.assert_close(ops.linear(x, marked).as_subclass(torch.Tensor), F.linear(x, weight))
    torch.func.vmap(ops.linear, in_dims=(0, None))(x[:, None], weight)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert len(products) == 1


def test_few_rows_of_long_sums_are_torchs(products, monkeypatch) -> None:
    """A copy of the weight costs more than its product with them."""
    monkeypatch.setattr(module, "_ROWS", 32)
    for rows, terms, asks in [(31, 385, False), (32, 385, True), (1, 384, True)]:
        del products[1:]
        ops.linear(rand(rows, terms).float(), rand(4, terms).float())
        assert (len(products) > 1) == (asks and products[0] == "onednn")


def test_module_is_nn_linear(products) -> None:
    ours, torchs = nn.Linear(24, 8), torch.nn.Linear(24, 8)
    ours.load_state_dict(torchs.state_dict())
    x = rand(5, 24).float()
    torch.testing.assert_close(ours(x), torchs(x))


def test_traces(products) -> None:
    """By torch.jit, which cannot record oneDNN's operator."""
    layer, x = nn.Linear(24, 9), rand(2, 3, 24).float()
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), F.linear(x, layer.weight, layer.bias))

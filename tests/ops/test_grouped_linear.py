"""ops.grouped_linear against one F.linear a group, whichever library multiplies."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch

#: Not the function, which has the module's name.
module = importlib.import_module("aigc_fast.ops.grouped_linear")
LOW = (torch.float32, torch.bfloat16, torch.float16)
#: where groups end, in_features, out_features
CASES = {
    "some": ([3, 3, 10, 31], 24, 17),
    "one": ([1], 50, 70),
    "few_rows": ([1, 3, 6, 10, 15, 31, 40], 65, 33),
    "none_at_the_ends": ([0, 0, 20, 20], 40, 48),
    "no_rows": ([0, 0, 0], 8, 4),
    "long_sums": ([5, 22], 1201, 9),
    "no_columns": ([2, 5], 8, 0),
    "no_features": ([2, 5], 0, 8),
}


@pytest.fixture(params=["ours", "torch"])
def products(request, monkeypatch):
    """Our kernel on any processor; the operators that were asked."""
    asked = [request.param]
    for name in ("_product", "_outer"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, n=name, f=original: asked.append(n) or f(*args)
        )
    monkeypatch.setattr(module, "lags", lambda dtype: request.param == "ours" and dtype in LOW)
    return asked


def plain(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Without a group's own gradient, in any dtype."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(a, w) for a, w in zip(x.split(sizes), weight.unbind(), strict=True)])


def example(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    bounds, features, out = CASES[case]
    x, weight = rand(bounds[-1], features), rand(len(bounds), out, features, seed=1)
    return x.to(dtype), weight.to(dtype), torch.tensor(bounds, dtype=torch.int32)


def derivatives(function, x, weight, ends) -> list[Tensor]:
    """y, its gradients, and theirs of a sum of squares."""
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    y = function(*inputs, ends)
    upstream = rand(*y.shape, seed=7).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return [y, *first, *torch.autograd.grad(penalty, [*inputs, upstream])]


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_a_product_for_each_group(case, dtype, products) -> None:
    low = example(case, dtype)
    exact = derivatives(plain, *(t.double() if t.is_floating_point() else t for t in low))
    torchs, mine = derivatives(plain, *low), derivatives(ops.grouped_linear, *low)
    assert_as_good_as_torch(mine, torchs, exact, dtype)
    with torch.no_grad():
        assert torch.equal(ops.grouped_linear(*low), mine[0])
    assert (len(products) > 1) == (products[0] == "ours" and dtype in LOW)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("order", ["x", "weight", "both"])
def test_any_strides(order, dtype, products) -> None:
    x, weight, ends = example("few_rows", dtype)
    want = ops.grouped_linear(x, weight, ends)
    if order != "weight":
        x = x.t().contiguous().t()
    if order != "x":
        weight = weight.mT.contiguous().mT
    exact = plain(x.double(), weight.double(), ends)
    assert_as_good_as_torch([ops.grouped_linear(x, weight, ends)], [want], [exact], dtype)
    gaps = weight.repeat_interleave(2, 2)[:, :, ::2]
    strided = ends.repeat_interleave(2)[::2]
    assert_as_good_as_torch([ops.grouped_linear(x, gaps, strided)], [want], [exact], dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_bits_do_not_depend_on_the_threads(dtype) -> None:
    x, weight, ends = example("few_rows", dtype)
    calls = [lambda: module._product(x, weight, ends), lambda: module._outer(x, x, ends)]
    want = [call() for call in calls]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(call(), w) for call, w in zip(calls, want, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_compiles_as_one_graph(dtype) -> None:
    x, weight, ends = example("some", dtype)
    compiled = torch.compile(ops.grouped_linear, fullgraph=True, backend="aot_eager")
    want = plain(x.double(), weight.double(), ends)
    torchs = plain(x, weight, ends)
    assert_as_good_as_torch([compiled(x, weight, ends)], [torchs], [want], dtype)
    inputs = x.requires_grad_(), weight.requires_grad_()
    upstream = torch.ones_like(torchs)
    got = torch.autograd.grad(compiled(*inputs, ends), inputs, upstream)
    mine = torch.autograd.grad(ops.grouped_linear(*inputs, ends), inputs, upstream)
    torch.testing.assert_close(got, mine)


def test_compiles_for_rows_that_begin_anywhere() -> None:
    x, weight, ends = example("none_at_the_ends", torch.bfloat16)
    torchs, want = plain(x, weight, ends), plain(x.double(), weight.double(), ends)
    x, weight = (F.pad(t, (1, 2))[..., 1:-2] for t in (x, weight))
    compiled = torch.compile(ops.grouped_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_as_good_as_torch([compiled(x, weight, ends)], [torchs], [want], x.dtype)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_casts_both(dtype, compiling, products) -> None:
    x, weight, ends = example("some", torch.float32)
    low = x.bfloat16(), weight.bfloat16()
    want = plain(*(t.double() for t in low), ends)
    function = ops.grouped_linear
    if compiling:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # as a product before it left it
        got = function(low[0].to(dtype), weight, ends)
        exact = ops.grouped_linear(x.double(), weight.double(), ends)
    assert got.dtype == torch.bfloat16 and exact.dtype == torch.float64
    assert_as_good_as_torch([got], [plain(*low, ends)], [want], torch.bfloat16)


def test_within_torch_func(products) -> None:
    x, weight, ends = example("some", torch.float32)
    grad = torch.func.grad(lambda w: ops.grouped_linear(x, w, ends).sum())(weight)
    want = torch.autograd.grad(plain(x, weight.requires_grad_(), ends).sum(), weight)[0]
    torch.testing.assert_close(grad, want)
    assert len(products) == 1


X, WEIGHT = torch.ones(5, 4), torch.ones(2, 3, 4)
ENDS = torch.tensor([2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((X[0], WEIGHT, ENDS), ValueError, "x must have 2 dimensions"),
        ((X.int(), WEIGHT, ENDS), TypeError, "x must be float64"),
        ((X, WEIGHT[0], ENDS), ValueError, "weight must have 3 dimensions"),
        ((X, WEIGHT.double(), ENDS), TypeError, "weight must have the dtype of x"),
        ((X, WEIGHT[..., 1:], ENDS), ValueError, "weight must have shape .groups > 0, out_feat"),
        ((X, WEIGHT[:0], ENDS[:0]), ValueError, "weight must have shape .groups > 0, out_feat"),
        ((X, WEIGHT, ENDS.long()), TypeError, "ends must be int32"),
        ((X, WEIGHT, ENDS[:1]), ValueError, r"ends must have shape \(2,\)"),
        ((X, WEIGHT, ENDS - 1), ValueError, "ends must not fall and end at the 5 rows of x"),
        ((X, WEIGHT, ENDS.flip(0)), ValueError, "ends must not fall and end at the 5 rows of x"),
        ((X, WEIGHT, ENDS + 1), ValueError, "ends must not fall and end at the 5 rows of x"),
        ((X, WEIGHT, ENDS - 3), ValueError, "ends must not fall and end at the 5 rows of x"),
    ],
)
def test_refuses(args, error, match, products) -> None:
    with pytest.raises(error, match=match):
        ops.grouped_linear(*args)


def test_obeys_backend() -> None:
    args = example("some", torch.float32)
    with aigc_fast.backend("reference"):
        torch.testing.assert_close(ops.grouped_linear(*args), plain(*args))

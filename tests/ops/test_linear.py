"""ops.linear: torch's own results, derivatives and errors, whichever library multiplies."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import nn, ops
from aigc_fast.ops import _registry
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch

#: Not the function, which has the module's name.
module = importlib.import_module("aigc_fast.ops.linear")
LOW = (torch.float32, torch.bfloat16, torch.float16)
is_large = module._is_large
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


@pytest.fixture(params=["ours", "torch"])
def products(request, monkeypatch):
    """Our kernel for products of any size, on any processor; and how often it was asked."""
    asked = []

    def product(*args):
        asked.append(args)
        return original(*args)

    original = module._product
    monkeypatch.setattr(module, "lags", lambda dtype: request.param == "ours" and dtype in LOW)
    monkeypatch.setattr(module, "_is_large", lambda x, weight: x.numel() > 0)
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
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
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
    expected = products[0] == "ours" and dtype in LOW and 0 not in shape
    assert (len(products) > 1) == expected


def test_any_strides(products) -> None:
    x, weight = rand(12, 20).float().t(), rand(12, 14).float().t()
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(ops.linear(x[::2], weight), F.linear(x[::2], weight))
    gaps = rand(14, 50).float()[:, :12]
    torch.testing.assert_close(ops.linear(x, gaps), F.linear(x, gaps))
    assert len(products) == (4 if products[0] == "ours" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_gaps_are_one_matrix(dtype, products, monkeypatch) -> None:
    """The tokens of images among those of texts: the product takes the bias with it."""
    whole, weight, bias = (rand(*s).to(dtype) for s in ((2, 7, 24), (9, 24), (9,)))
    seen, multiply = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x) or multiply(x, *rest))
    for x in (whole[:, 2:], whole.transpose(0, 1), whole[:, :, ::2]):
        w = weight[:, : x.shape[-1]].contiguous()
        y, stock = ops.linear(x, w, bias), multiply(x, w, bias)
        want = multiply(x.double(), w.double(), bias.double())
        assert y.shape == stock.shape
        assert_as_good_as_torch([y], [stock], [want], dtype)
    asked = products[1:] or [[x] for x in seen]
    assert [args[0].dim() for args in asked] == [2, 2, 2]


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


def test_another_backend_is_torchs(products) -> None:
    """The interpreter runs Triton's kernels on CPU tensors, and products beside them."""
    x, weight = rand(8, 16).float(), rand(4, 16).float()
    with _registry._intercepting(lambda op, args: pytest.fail(op.name), "triton"):
        assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


def test_small_products_are_torchs(products, monkeypatch) -> None:
    """What it costs to call and to pack is more than they take."""
    monkeypatch.setattr(module, "_is_large", is_large)
    monkeypatch.setattr(module, "_by_dots", lambda dtype: dtype == torch.bfloat16)
    for dtype, rows, terms, columns, asks in [
        (torch.float32, 1, 512, 512, True),
        (torch.float32, 1, 512, 511, False),
        (torch.float32, 4, 256, 256, True),
        (torch.float32, 5, 512, 256, False),
        (torch.float32, 6, 512, 256, True),
        (torch.float32, 4096, 64, 15, False),
        (torch.float16, 1, 256, 512, True),
        (torch.float16, 1, 256, 511, False),
        (torch.bfloat16, 1, 128, 64, True),
        (torch.bfloat16, 1, 128, 63, False),
        (torch.bfloat16, 4096, 64, 15, False),
    ]:
        del products[1:]
        ops.linear(rand(rows, terms).to(dtype), rand(columns, terms).to(dtype))
        assert (len(products) > 1) == (asks and products[0] == "ours")
    # Where the weight has to be packed.
    for dtype, rows, columns, asks in [
        (torch.float32, 1, 2048, False),
        (torch.float32, 2, 768, True),
        (torch.float32, 2, 767, False),
        (torch.float16, 3, 1024, False),
        (torch.float16, 4, 1024, True),
    ]:
        del products[1:]
        ops.linear(rand(rows, 1024).to(dtype), rand(1024, columns).to(dtype).t())
        assert (len(products) > 1) == (asks and products[0] == "ours")


def test_gradients_of_weights_by_dots_are_torchs(products, monkeypatch) -> None:
    monkeypatch.setattr(module, "_is_large", is_large)
    monkeypatch.setattr(module, "_by_dots", lambda dtype: dtype == torch.bfloat16)
    x, weight = rand(64, 128).bfloat16(), rand(64, 128, seed=1).bfloat16().requires_grad_()
    ops.linear(x.requires_grad_(), weight).backward(torch.ones(64, 64).bfloat16())
    shapes = [(args[0].shape, args[1].shape) for args in products[1:]]
    assert shapes == ([((64, 128), (64, 128)), ((64, 64), (128, 64))] if len(shapes) else [])
    assert bool(shapes) == (products[0] == "ours")


def test_module_is_nn_linear(products) -> None:
    ours, torchs = nn.Linear(24, 8), torch.nn.Linear(24, 8)
    ours.load_state_dict(torchs.state_dict())
    x = rand(5, 24).float()
    torch.testing.assert_close(ours(x), torchs(x))


def test_traces(products) -> None:
    """By torch.jit, to torch's own operator, which runs everywhere."""
    layer, x = nn.Linear(24, 9), rand(2, 3, 24).float()
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("order", ["plain", "x_transposed", "weight_transposed", "both"])
@pytest.mark.parametrize(
    ("rows", "terms", "columns"),
    [
        *[(1, 1, 1), (7, 33, 49), (8, 256, 48), (17, 257, 47), (31, 513, 97), (530, 40, 200)],
        *[(rows, 95, 67) for rows in range(2, 7)],
        *[(16, 64, 33), (21, 1030, 96)],
    ],
)
def test_kernel(rows, terms, columns, order, dtype) -> None:
    """The edges of tiles and blocks, in every order of memory, for any number of threads."""
    x, weight, bias = rand(rows, terms), rand(columns, terms, seed=1), rand(columns, seed=2)
    low = [t.to(dtype) for t in (x, weight, bias)]
    exact = F.linear(*(t.double() for t in low))
    plain = F.linear(*low)
    if order in ("x_transposed", "both"):
        low[0] = low[0].t().contiguous().t()
    if order in ("weight_transposed", "both"):
        low[1] = low[1].t().contiguous().t()
    mine = module._product(*low)
    assert mine.is_contiguous()
    assert_as_good_as_torch([mine], [plain], [exact], dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(module._product(*low), mine)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("terms", [50, 51])
def test_kernel_reads_and_writes_no_more_than_there_is(terms, begin, dtype) -> None:
    """Rows and columns between others, of which none but these is read or changed."""
    whole = rand(40, 70).to(dtype), rand(96, 70, seed=1).to(dtype)
    x, weight = (t[:, begin : begin + terms] for t in whole)
    plain = x.contiguous(), weight.contiguous()
    for t in whole:
        t[:, :begin] = t[:, begin + terms :] = torch.nan
    for rows in (40, 9):
        expected = module._product(plain[0][:rows], plain[1], None)
        assert expected.isfinite().all()
        assert torch.equal(module._product(x[:rows], weight, None), expected)
    expected = module._product(*plain, None)
    assert torch.equal(module._product(x.t().contiguous().t(), weight, None), expected)
    spread = rand(1, terms).to(dtype).expand(9, terms)
    expected = module._product(spread.contiguous(), weight, None)
    assert torch.equal(module._product(spread, weight, None), expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rows", [7, 20])
def test_nan_stays_in_its_row_and_column(rows, dtype) -> None:
    x, weight = rand(rows, 30).to(dtype), rand(50, 30, seed=1).to(dtype)
    x[3, 4], weight[5, 6] = torch.nan, torch.inf
    expected = F.linear(x, weight)
    torch.testing.assert_close(module._product(x, weight, None), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "match"),
    [
        (rand(3, 4).float(), rand(5, 6).float(), None, "weight must have shape"),
        (rand(3, 0).float(), rand(5, 0).float(), None, "weight must have shape"),
        (rand(3, 4).float(), rand(5, 4).float(), rand(6).float(), "bias must have shape"),
        (rand(2, 3, 4).float(), rand(5, 4).float(), None, "x must have 2 dim"),
        (rand(3, 4), rand(5, 4), None, "x must be float32, bfloat16 or float16"),
    ],
)
def test_kernel_refuses(x, weight, bias, match) -> None:
    with pytest.raises(ValueError, match=match):
        module._product(x, weight, bias)


@pytest.mark.skipif(not module.mkl_lags(), reason="torch's own products are as fast here")
def test_explain() -> None:
    found = str(aigc_fast.explain(ops.linear, torch.ones(64, 256), torch.ones(128, 256)))
    assert found == "linear: cpu (cpu_avx512, as operator linear_product)"

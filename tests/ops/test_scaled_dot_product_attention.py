"""Attention of many queries, beside torch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from aigc_fast import ops
from aigc_fast.ops._dense_attention import attend, dense_attention
from aigc_fast.ops._winograd import are_faster
from aigc_fast.ops.linear import mkl_lags
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch, recorded

#: batch, heads, kv_heads, queries, keys, head_dim, value_dim, causal
CASES = {
    "image": (2, 1, 1, 64, 64, 256, 256, False),
    "odd": (1, 3, 3, 37, 53, 33, 17, False),
    "cross": (2, 2, 2, 50, 7, 40, 40, False),
    "one": (1, 1, 1, 1, 1, 1, 1, False),
    "grouped": (2, 6, 2, 49, 61, 24, 40, False),
    "causal": (1, 4, 2, 150, 150, 64, 64, True),
    "causal, more keys": (1, 2, 1, 33, 70, 8, 8, True),
    "causal, fewer keys": (1, 2, 2, 70, 33, 8, 8, True),
    "blocks of keys": (1, 2, 2, 49, 2500, 16, 40, False),
    "causal blocks": (1, 1, 1, 2100, 2100, 8, 8, True),
    "several rounds": (3, 2, 2, 5, 3000, 128, 128, False),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tokens(case, dtype, scale=1.0):
    batch, heads, kv_heads, queries, keys, dim, value_dim, causal = CASES[case]
    query = scale * rand(batch, queries, heads, dim)
    key = rand(batch, keys, kv_heads, dim, seed=1)
    value = rand(batch, keys, kv_heads, value_dim, seed=2)
    return [t.to(dtype) for t in (query, key, value)], causal


def plain(query, key, value, causal, scale=None):
    """torch's, in its own layout."""
    by_head = [t.transpose(1, 2) for t in (query, key, value)]
    grouped = query.shape[2] != key.shape[2]
    y = F.scaled_dot_product_attention(*by_head, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


@pytest.mark.parametrize("order", ["tokens", "heads", "strided"])
@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES)
def test_is_as_good_as_torch(case, dtype, order) -> None:
    (query, key, value), causal = tokens(case, dtype)
    if order == "heads":
        query, key, value = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)
        )
    elif order == "strided":
        query, key, value = (
            t.repeat_interleave(2, -1)[..., ::2].flip(1).contiguous().flip(1)
            for t in (query, key, value)
        )
        query = query.transpose(2, 3).contiguous().transpose(2, 3)
    scale = query.shape[3] ** -0.5
    mine = attend(query, key, value, scale, causal)
    exact = plain(query.double(), key.double(), value.double(), causal)
    assert_as_good_as_torch([mine], [plain(query, key, value, causal)], [exact], dtype)
    assert mine.is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_in_float64(case) -> None:
    (query, key, value), causal = tokens(case, torch.float64)
    mine = attend(query, key, value, 0.3, causal)
    want = plain(query, key, value, causal, 0.3)
    torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-13)


@EVERY_DTYPE
def test_large_scores(dtype) -> None:
    """One key takes all, in whichever block it is; none overflows."""
    (query, key, value), causal = tokens("blocks of keys", dtype, scale=100)
    mine = attend(query, key, value, 1.0, causal)
    exact = plain(query.double(), key.double(), value.double(), causal, 1.0)
    assert_as_good_as_torch([mine], [plain(query, key, value, causal, 1.0)], [exact], dtype)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale) -> None:
    (query, key, value), causal = tokens("odd", torch.float32)
    mine = attend(query, key, value, scale, causal)
    torch.testing.assert_close(mine, plain(query, key, value, causal, scale))


def test_nan_stays_in_its_row() -> None:
    (query, key, value), causal = tokens("odd", torch.float32)
    query[0, 3, 1, 5] = math.nan
    mine = attend(query, key, value, 1.0, causal)
    lost = mine.isnan().all(-1)
    assert lost[0, 3, 1] and lost.sum() == mine.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads) -> None:
    (query, key, value), causal = tokens("causal", torch.bfloat16)
    want, before = attend(query, key, value, 0.1, causal), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert attend(query, key, value, 0.1, causal).equal(want)
    finally:
        torch.set_num_threads(before)


# ---- gradients ------------------------------------------------------------------------------


def with_gradients(function, inputs, *how):
    """The result and the gradients of a random upstream gradient, which every dtype holds."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs, *how)
    upstream = rand(*y.shape, seed=7).to(torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def composed(query, key, value, causal):
    """Plain operators of torch, each of which rounds: what flash attention of torch does not."""
    grouped = query.unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, key) * query.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -math.inf)
    return torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), value).flatten(2, 3)


@pytest.mark.parametrize("order", ["tokens", "heads"])
@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_good_as_torch(case, dtype, order) -> None:
    inputs, causal = tokens(case, dtype)
    if order == "heads":
        inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    mine = with_gradients(attend, inputs, inputs[0].shape[3] ** -0.5, causal)
    stock = with_gradients(composed, inputs, causal)
    exact = with_gradients(composed, [t.double() for t in inputs], causal)
    assert_as_good_as_torch(mine, stock, exact, dtype)


@pytest.mark.parametrize("case", ["odd", "grouped", "causal, more keys", "causal, fewer keys"])
def test_gradients_in_float64(case) -> None:
    inputs, causal = tokens(case, torch.float64)
    mine = with_gradients(attend, inputs, inputs[0].shape[3] ** -0.5, causal)
    want = with_gradients(composed, inputs, causal)
    torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-13)


def test_second_derivatives() -> None:
    inputs = [rand(1, 3, 2, 2), rand(1, 4, 1, 2, seed=1), rand(1, 4, 1, 3, seed=2)]
    inputs = [t.double().requires_grad_() for t in inputs]
    for causal in (False, True):
        assert torch.autograd.gradcheck(lambda *x, c=causal: attend(*x, 0.7, c), inputs)
        assert torch.autograd.gradgradcheck(lambda *x, c=causal: attend(*x, 0.7, c), inputs)


@pytest.mark.parametrize("related", [lambda x: (x, x, x), lambda x: (x, 1.5 * x, x)])
def test_second_derivatives_of_related_inputs(related) -> None:
    """The way from one input to another is not the operator's to go."""
    x = rand(1, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: attend(*related(2 * x), 0.7, False), [x])


def test_gradients_of_large_scores() -> None:
    """Where one key takes all, the gradient of its value is that of the result."""
    (query, key, value), causal = tokens("odd", torch.float32, scale=1e4)
    inputs = [query, key, value]
    scale = query.shape[3] ** -0.5
    mine = with_gradients(attend, inputs, scale, causal)[3]
    stock, exact = (
        with_gradients(composed, [t.to(dtype) for t in inputs], causal)[3]
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_good_as_torch([mine], [stock], [exact], torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_no_queries(causal) -> None:
    inputs = rand(2, 0, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 3)
    for grad, t in zip(with_gradients(attend, inputs, 1.0, causal)[1:], inputs, strict=True):
        assert grad.shape == t.shape and not grad.any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some(wanted) -> None:
    """Where one side is not wanted, as of frozen keys, its products are not made."""
    inputs, causal = tokens("grouped", torch.float32)
    want = with_gradients(attend, inputs, 0.5, causal)[1:]
    inputs = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    y = attend(*inputs, 0.5, causal)
    with recorded() as calls:
        y.backward(rand(*y.shape, seed=7).to(torch.bfloat16).to(y.dtype))
    for i, t in enumerate(inputs):
        assert t.grad.equal(want[i]) if i in wanted else t.grad is None
    ((op, args),) = calls
    of_query, of_others = 0 in wanted, 1 in wanted or 2 in wanted
    assert [t.numel() > 0 for t in op.overload(*args)] == [of_query, of_others, of_others]


# ---- the function of torch's name -----------------------------------------------------------


def by_head(case, dtype):
    found, causal = tokens(case, dtype)
    return [t.transpose(1, 2) for t in found], causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_what_pays(dtype) -> None:
    inputs, causal = by_head("causal", dtype)
    with recorded() as calls:
        mine = ops.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
    stock, exact = (
        F.scaled_dot_product_attention(*of, is_causal=causal, enable_gqa=True)
        for of in (inputs, [t.double() for t in inputs])
    )
    assert_as_good_as_torch([mine], [stock], [exact], dtype)
    assert mine.stride() == stock.stride()
    assert bool(calls) == (mkl_lags() and are_faster())


def test_heeds_sdpa_kernel() -> None:
    inputs, _ = by_head("image", torch.float32)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend), recorded() as calls:
            mine = ops.scaled_dot_product_attention(*inputs)
            stock = F.scaled_dot_product_attention(*inputs)
        if backend is SDPBackend.MATH:
            assert mine.equal(stock) and not calls
        else:
            assert bool(calls) == (mkl_lags() and are_faster())


@pytest.mark.parametrize("name", ["is_causal", "enable_gqa"])
@pytest.mark.parametrize("value", [1, "no", None])
def test_flags_are_bools(name, value) -> None:
    inputs, _ = by_head("image", torch.float32)
    with pytest.raises(TypeError, match=name):
        ops.scaled_dot_product_attention(*inputs, **{name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"attn_mask": torch.rand(37, 53) > 0.3},
        {"dropout_p": 0.5},
        {"queries": 7},
        {"dtype": torch.float64},
        {"features": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_is_torch(change) -> None:
    inputs, _ = by_head("odd", change.pop("dtype", torch.float32))
    inputs[0] = inputs[0][:, :, : change.pop("queries", None)]
    inputs[2] = inputs[2][..., : change.pop("features", None)]
    torch.manual_seed(0)
    with recorded() as calls:
        mine = ops.scaled_dot_product_attention(*inputs, **change)
    torch.manual_seed(0)
    assert mine.equal(F.scaled_dot_product_attention(*inputs, **change)) and not calls


def test_gradients_of_the_function() -> None:
    inputs, causal = by_head("causal", torch.float32)
    how = dict(is_causal=causal, enable_gqa=True)
    mine, stock = (
        with_gradients(lambda *x, f=f: f(*x, **how), inputs)
        for f in (ops.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(mine, stock)


def test_compiles_whole() -> None:
    inputs, _ = by_head("odd", torch.float32)
    compiled = torch.compile(ops.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype) -> None:
    """What is in autocast's dtype already stays ours; its second derivative is not lowered."""
    inputs, causal = by_head("causal", dtype)
    how = dict(is_causal=causal, enable_gqa=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), recorded() as calls:
        mine = ops.scaled_dot_product_attention(*inputs, **how)
        stock = F.scaled_dot_product_attention(*inputs, **how)
    exact = F.scaled_dot_product_attention(*(t.double() for t in inputs), **how)
    assert_as_good_as_torch([mine], [stock], [exact], torch.bfloat16)
    assert bool(calls) == (mkl_lags() and are_faster() and dtype is torch.bfloat16)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((1, 2, 40, 8), (1, 2, 40, 9), (1, 2, 40, 8)), {}),
        (((1, 4, 40, 8), (1, 3, 40, 8), (1, 3, 40, 8)), {"enable_gqa": True}),
    ],
)
def test_errors_are_those_of_torch(shapes, options) -> None:
    inputs = [rand(*shape).float() for shape in shapes]
    with pytest.raises(Exception) as stock:
        F.scaled_dot_product_attention(*inputs, **options)
    with pytest.raises(type(stock.value)):
        ops.scaled_dot_product_attention(*inputs, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": rand(1, 8, 4)}, ValueError, "query must have 4 dimensions"),
        ({"key": rand(1, 9, 2, 4).float()}, TypeError, "key must have the dtype of query"),
        ({"key": rand(1, 9, 2, 5)}, ValueError, "key must have shape"),
        ({"value": rand(1, 8, 2, 4)}, ValueError, "value must have shape"),
        ({"query": rand(1, 8, 3, 4)}, ValueError, "key must have tokens, and heads by which"),
        (
            {"key": rand(1, 0, 2, 4), "value": rand(1, 0, 2, 4)},
            ValueError,
            "key must have tokens",
        ),
        ({"value": rand(1, 9, 2, 0)}, ValueError, "value must have features"),
    ],
)
def test_the_operator_refuses(change, error, message) -> None:
    inputs = {
        "query": rand(1, 8, 4, 4), "key": rand(1, 9, 2, 4), "value": rand(1, 9, 2, 4)
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        dense_attention(*inputs.values(), 1.0, False)


def test_no_queries() -> None:
    y = attend(rand(2, 0, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 3), 1.0, False)
    assert y.shape == (2, 0, 4, 3)

"""ops.conv2d: torch's own results, derivatives and errors, whichever way the products are made."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import nn, ops
from tests.op_samples.sample import channels_last, rand
from tests.ops.test_every_op import assert_as_good_as_torch
from tests.ops.test_linear import derivatives

#: Not the function, which has the module's name.
module = importlib.import_module("aigc_fast.ops.conv2d")
#: x and weight. Odd sizes have tiles that reach beyond them; 40 outputs are no whole group.
SERVED = {
    "odd": ((2, 17, 5, 7), (20, 17, 3, 3)),
    "even": ((2, 32, 8, 6), (40, 32, 3, 3)),
    "smallest": ((16, 16, 2, 2), (9, 16, 3, 3)),
    "many_tiles": ((3, 24, 30, 31), (33, 24, 3, 3)),
    "deep": ((3, 200, 9, 3), (16, 200, 3, 3)),
}
TORCHS = {
    "few_inputs": (15, 16, {}),
    "few_outputs": (16, 8, {}),
    "stride": (16, 16, {"stride": (2, 1)}),
    "dilation": (16, 16, {"padding": (1, 1), "dilation": 2}),
    "groups": (32, 16, {"groups": 2}),
    "no_border": (16, 16, {"padding": 0}),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Ours for images of any size; and how often it was asked."""
    asked = []

    def convolution(*args):
        asked.append(args)
        return original(*args)

    original = module._conv3x3
    monkeypatch.setattr(module, "_LEAST", 1)
    monkeypatch.setattr(module, "_most_pixels", lambda dtype: math.inf)
    monkeypatch.setattr(module, "_conv3x3", convolution)
    return asked


def torchs(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


def ours(x, weight, bias=None):
    return ops.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("layout", [lambda t: t, channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("case", SERVED)
def test_is_torchs(case, dtype, with_bias, layout, calls) -> None:
    shape, kernel = SERVED[case]
    weight = rand(*kernel, seed=1, scale=(9 * kernel[1]) ** -0.5)
    bias = rand(kernel[0], seed=2).to(dtype) if with_bias else None
    low = [layout(rand(*shape).to(dtype)), layout(weight.to(dtype)), bias]
    exact = derivatives(torchs, *(None if t is None else t.double() for t in low))
    plain, mine = derivatives(torchs, *low), derivatives(ours, *low)
    if dtype is torch.float64:  # which has no better reference than itself
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    else:
        assert_as_good_as_torch(mine, plain, exact, dtype)
    assert mine[0].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(ours(*low), mine[0])
    assert len(calls) == 2


@pytest.mark.parametrize("case", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_without_a_graph(case, dtype) -> None:
    """Those of a training step, which are ours; of more derivatives torch computes the first."""
    shape, kernel = SERVED[case]
    low = [rand(*shape).to(dtype), (rand(*kernel, seed=1) * 0.05).to(dtype), rand(kernel[0])]
    low[2] = low[2].to(dtype)
    upstream = rand(shape[0], kernel[0], *shape[2:], seed=3).to(dtype)

    def gradients(function, like):
        inputs = [t.to(like).requires_grad_() for t in low]
        return list(torch.autograd.grad(function(*inputs), inputs, upstream.to(like)))

    exact = gradients(torchs, torch.float64)
    assert_as_good_as_torch(gradients(ours, dtype), gradients(torchs, dtype), exact, dtype)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone(wanted) -> None:
    inputs = {"x": rand(6, 16, 3, 4), "weight": rand(12, 16, 3, 3), "bias": rand(12)}
    inputs[wanted].requires_grad_()
    (mine,) = torch.autograd.grad(ours(**inputs).sum(), inputs[wanted])
    (plain,) = torch.autograd.grad(torchs(**inputs).sum(), inputs[wanted])
    torch.testing.assert_close(mine, plain)


def test_gradcheck() -> None:
    inputs = [rand(11, 16, 2, 3), rand(9, 16, 3, 3), rand(9)]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


def test_any_strides(calls) -> None:
    """Of x, of weight, and of the gradient, which comes expanded."""
    x, weight = rand(4, 18, 6, 10).float(), rand(12, 18, 3, 3).float()
    for view in (
        x.transpose(2, 3),
        x[:, :, ::2, 1:],
        x[:, :16],
        x.permute(3, 1, 0, 2)[:, :, :2],
        channels_last(x)[:, 1:17, 1:4, 2:9],
    ):
        for kernel in (
            weight[:, : view.shape[1]],
            weight.flip(0)[::1].transpose(2, 3)[:, : view.shape[1]],
            rand(view.shape[1], 12, 3, 3).float().transpose(0, 1),
            channels_last(weight)[:, : view.shape[1]],
        ):
            leaf = view.detach().requires_grad_()
            y = ours(leaf, kernel)
            torch.testing.assert_close(y, torchs(view, kernel), rtol=2e-5, atol=2e-5)
            (mine,) = torch.autograd.grad(y.sum(), leaf)
            (plain,) = torch.autograd.grad(torchs(leaf, kernel).sum(), leaf)
            torch.testing.assert_close(mine, plain, rtol=2e-5, atol=2e-5)
    assert len(calls) == 20


@pytest.mark.parametrize("case", TORCHS)
def test_others_are_torchs(case, calls) -> None:
    channels, outs, how = TORCHS[case]
    how = {"padding": 1, **how}
    x = rand(2, channels, 6, 6).float()
    weight = rand(outs, channels // how.get("groups", 1), 3, 3).float()
    assert torch.equal(ops.conv2d(x, weight, **how), F.conv2d(x, weight, **how))
    assert not calls


@pytest.mark.parametrize(
    "shape", [(64, 16, 1, 9), (3, 16, 4, 4), (16, 9, 9)], ids=["lines", "few_pixels", "no_batch"]
)
def test_other_images_are_torchs(shape, calls) -> None:
    x, weight = rand(*shape).float(), rand(16, 16, 3, 3).float()
    assert torch.equal(ours(x, weight), torchs(x, weight))
    assert torch.equal(ops.conv2d(x, weight[..., :1, :1]), F.conv2d(x, weight[..., :1, :1]))
    assert not calls


@pytest.mark.parametrize(
    "how", [{"padding": "same"}, {"padding": (1, 1), "stride": (1, 1), "dilation": [1, 1]}], ids=str
)
def test_other_words_for_the_same(how, calls) -> None:
    x, weight = rand(4, 16, 4, 5), rand(12, 16, 3, 3)
    torch.testing.assert_close(ops.conv2d(x, weight, **how), torchs(x, weight))
    assert len(calls) == 1


def test_the_same_bits_for_any_number_of_threads() -> None:
    weight = rand(70, 48, 3, 3).float()
    before = torch.get_num_threads()
    try:
        # Few tiles, which threads share by outputs, and many, which they share by tiles.
        for size in (9, 40, 300):
            x, results = rand(1, 48, size, size).float(), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                leaves = [t.detach().requires_grad_() for t in (x, weight)]
                y = ours(*leaves)
                results.append([y, *torch.autograd.grad(y, leaves, y.detach())])
            for other in results[1:]:
                assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, weight = rand(6, 32, 20, 20).float(), rand(64, 32, 3, 3).float()
    assert ours(x, weight)[2:3].equal(ours(x[2:3], weight))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (rand(1, 18, 4, 4), rand(12, 16, 3, 3), None),
        (rand(1, 16, 4, 4), rand(12, 16, 3, 3), rand(11)),
        (rand(1, 16, 4, 4), rand(12, 16, 3, 3).float(), None),
        (rand(16, 4), rand(12, 16, 3, 3), None),
    ],
    ids=["channels", "bias", "dtype", "dimensions"],
)
def test_torchs_errors(x, weight, bias) -> None:
    with pytest.raises(RuntimeError) as theirs:
        torchs(x, weight, bias)
    with pytest.raises(RuntimeError) as mine:
        ours(x, weight, bias)
    assert str(mine.value) == str(theirs.value)


def test_elsewhere_it_is_torchs_own(calls) -> None:
    x, weight = rand(4, 16, 4, 4).float(), rand(12, 16, 3, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x, weight).dtype == torch.bfloat16
    marked = weight.as_subclass(type("Marked", (torch.Tensor,), {}))
    torch.testing.assert_close(ours(x, marked).as_subclass(torch.Tensor), torchs(x, weight))
    torch.func.vmap(ours, in_dims=(0, None))(x[:, None], weight)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), torchs(x, weight))
    assert not calls


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_module_is_nn_conv2d(padding_mode, calls) -> None:
    how = dict(kernel_size=3, padding=1, padding_mode=padding_mode)
    mine, plain = nn.Conv2d(16, 24, **how), torch.nn.Conv2d(16, 24, **how)
    mine.load_state_dict(plain.state_dict())
    x = rand(3, 16, 5, 6).float()
    torch.testing.assert_close(mine(x), plain(x))
    assert len(calls) == (padding_mode == "zeros")


def test_explain_knows_whose_products_they_are() -> None:
    x, weight = rand(4, 16, 4, 4).requires_grad_(), rand(12, 16, 3, 3)
    found = aigc_fast.explain(ops.conv2d, x, weight, padding=1)
    assert found.implementation == "cpu" and "conv3x3" in found.reason
    assert aigc_fast.explain(ops.conv2d, x, weight).implementation == "torch"

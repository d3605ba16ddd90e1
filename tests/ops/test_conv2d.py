"""ops.conv2d: torch's own results, derivatives and errors, whichever way the products are made."""

import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import nn, ops
from tests.op_samples.sample import channels_last, rand
from tests.ops.test_every_op import assert_as_good_as_torch
from tests.ops.test_linear import derivatives

module = importlib.import_module("aigc_fast.ops._winograd")
linear = importlib.import_module("aigc_fast.ops.linear")
CONV4X4 = module.CONV4X4
#: ours, torch's, and with which arguments
KINDS = {
    "3x3": (ops.conv2d, F.conv2d, {"padding": 1}),
    "4x4": (ops.conv2d, F.conv2d, {"stride": 2, "padding": 1}),
    "3x3_transposed": (ops.conv_transpose2d, F.conv_transpose2d, {"padding": 1}),
    "4x4_transposed": (ops.conv_transpose2d, F.conv_transpose2d, {"stride": 2, "padding": 1}),
}
#: Kind, channels, outputs, batch and size. Odd sizes have tiles that reach beyond them; 40 outputs
#: are no whole group.
SERVED = {
    "odd": ("3x3", 17, 20, 2, 5, 7),
    "even": ("3x3", 32, 40, 2, 8, 6),
    "smallest": ("3x3", 16, 16, 16, 2, 2),
    "many_tiles": ("3x3", 24, 33, 3, 30, 31),
    "deep": ("3x3", 200, 16, 3, 9, 3),
    "strided": ("4x4", 17, 33, 2, 8, 10),
    "strided_smallest": ("4x4", 16, 16, 16, 2, 2),
    "strided_tiles": ("4x4", 24, 20, 2, 36, 50),
    "strided_deep": ("4x4", 130, 16, 3, 6, 14),
    "strided_one_tile_wide": ("4x4", 140, 36, 4, 8, 8),
    "strided_whole_tiles": ("4x4", 40, 70, 4, 16, 16),
    "transposed": ("3x3_transposed", 20, 40, 3, 6, 5),
    "doubled": ("4x4_transposed", 17, 33, 2, 5, 7),
    "doubled_smallest": ("4x4_transposed", 16, 16, 64, 1, 1),
    "doubled_tiles": ("4x4_transposed", 24, 20, 2, 18, 25),
    "doubled_deep": ("4x4_transposed", 130, 16, 3, 3, 8),
    "doubled_one_tile_wide": ("4x4_transposed", 200, 36, 4, 4, 4),
    "doubled_whole_tiles": ("4x4_transposed", 40, 70, 4, 8, 8),
    "doubled_many_images": ("4x4_transposed", 216, 16, 86, 4, 4),
}
ONE_OF_EACH = ["odd", "strided", "transposed", "doubled"]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Ours for images of any size; and how often its operators were asked for an output."""
    asked = []

    def counted(operator):
        def call(*args):
            asked.append(args)
            return operator(*args)

        return call

    monkeypatch.setattr(module, "_LEAST", 1)
    monkeypatch.setattr(module, "_most_pixels", lambda kind, dtype: math.inf)
    for name in ("CONV3X3", "CONV4X4"):
        kind = getattr(module, name)
        kind = kind._replace(
            waste=math.inf,
            conv=counted(kind.conv),
            transpose=counted(kind.transpose),
        )
        monkeypatch.setattr(module, name, kind)
    return asked


def case_of(name, dtype=torch.float32):
    """Ours, torch's, x, weight and bias."""
    kind, channels, outs, batch, *size = SERVED[name]
    mine, plain, how = KINDS[kind]
    kernel = int(kind[0])
    shape = (channels, outs) if "transposed" in kind else (outs, channels)
    weight = rand(*shape, kernel, kernel, seed=1, scale=(kernel**2 * channels) ** -0.5)
    tensors = [rand(batch, channels, *size), weight, rand(outs, seed=2)]
    return partial(mine, **how), partial(plain, **how), *(t.to(dtype) for t in tensors)


def ours(x, weight, bias=None):
    return ops.conv2d(x, weight, bias, padding=1)


def torchs(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("layout", [lambda t: t, channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", SERVED)
def test_is_torchs(name, dtype, with_bias, layout, calls) -> None:
    ours, torchs, x, weight, bias = case_of(name, dtype)
    low = [layout(x), layout(weight), bias if with_bias else None]
    exact = derivatives(torchs, *(None if t is None else t.double() for t in low))
    plain, mine = derivatives(torchs, *low), derivatives(ours, *low)
    if dtype is torch.float64:  # which has no better reference than itself
        torch.testing.assert_close(mine, plain)
    else:
        assert_as_good_as_torch(mine, plain, exact, dtype)
    assert mine[0].is_contiguous(memory_format=torch.channels_last)
    before = len(calls)
    with torch.no_grad():
        assert torch.equal(ours(*low), mine[0])
    assert len(calls) == before + 1 > 5


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["x", "weight", "bias"])
def test_one_gradient_alone(wanted, name) -> None:
    ours, torchs, *inputs = case_of(name)
    inputs[wanted].requires_grad_()
    (mine,) = torch.autograd.grad(ours(*inputs).sum(), inputs[wanted])
    (plain,) = torch.autograd.grad(torchs(*inputs).sum(), inputs[wanted])
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_nobody_asks_for_is_not_computed(name, monkeypatch, calls) -> None:
    """The gradient of a weight that requires one, where only that of x is wanted; and those of an
    output on which the loss does not depend."""
    ours, _, x, weight, bias = case_of(name)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    weights = []
    for kind in ("CONV3X3", "CONV4X4"):
        kept = getattr(module, kind)
        counted = lambda *args, f=kept.weight_gradient: weights.append(1) or f(*args)  # noqa: E731
        monkeypatch.setattr(module, kind, kept._replace(weight_gradient=counted))
    y = ours(*inputs)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    y.sum().backward(inputs=[x], retain_graph=True)
    assert not weights and len(calls) == 3
    torch.autograd.grad(first.square().sum(), weight)  # y is linear in x: not by way of it
    assert len(weights) == 1 and len(calls) == 3
    y.sum().backward()
    assert len(weights) == 2 and len(calls) == 4


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_is_none(calls) -> None:
    x, weight = rand(4, 16, 4, 4).requires_grad_(), rand(16, 16, 3, 3).requires_grad_()
    (by_x,) = torch.autograd.grad(_Cut.apply(ours(x, weight)).sum(), x, allow_unused=True)
    assert by_x is None and len(calls) == 1


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradcheck(name) -> None:
    ours, _, *inputs = case_of(name, torch.float64)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


def test_third_derivative() -> None:
    results = []
    for function in case_of("strided", torch.float64)[:2]:
        _, _, x, weight, _ = case_of("strided", torch.float64)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        (first,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        results.append(torch.autograd.grad(second.pow(2).sum(), [x, weight]))
    torch.testing.assert_close(*results)


def test_any_strides(calls) -> None:
    """Of x, of weight, and of the gradient, which comes expanded."""
    x, weight = rand(4, 18, 6, 10).float(), rand(20, 18, 3, 3).float()
    views = (
        x.transpose(2, 3),
        x[:, :, ::2, 1:],
        x[:, :16],
        x.permute(3, 1, 0, 2)[:, :, :2],
        channels_last(x)[:, 1:17, 1:4, 2:9],
    )
    for view in views:
        for kernel in (
            weight[:, : view.shape[1]],
            weight.flip(0)[::1].transpose(2, 3)[:, : view.shape[1]],
            rand(view.shape[1], 20, 3, 3).float().transpose(0, 1),
            channels_last(weight)[:, : view.shape[1]],
        ):
            leaf = view.detach().requires_grad_()
            y = ours(leaf, kernel)
            torch.testing.assert_close(y, torchs(view, kernel), rtol=2e-5, atol=2e-5)
            (mine,) = torch.autograd.grad(y.sum(), leaf)
            (plain,) = torch.autograd.grad(torchs(leaf, kernel).sum(), leaf)
            torch.testing.assert_close(mine, plain, rtol=2e-5, atol=2e-5)
    assert len(calls) == 2 * 20


@pytest.mark.parametrize(
    ("channels", "outs", "kernel", "how"),
    [
        (15, 16, 3, {}),
        (16, 15, 3, {}),
        (16, 16, 3, {"stride": (2, 1)}),
        (16, 16, 3, {"dilation": 2}),
        (32, 32, 3, {"groups": 2}),
        (16, 16, 3, {"padding": 0}),
        (16, 16, 5, {}),
        (16, 16, 4, {}),
        (16, 16, 4, {"stride": 2, "padding": 2}),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_others_are_torchs(channels, outs, kernel, how, transposed, calls) -> None:
    how = {"padding": 1, **how}
    x, groups = rand(2, channels, 6, 8).float(), how.get("groups", 1)
    shape = (channels, outs // groups) if transposed else (outs, channels // groups)
    weight = rand(*shape, kernel, kernel).float()
    mine, plain = KINDS["4x4_transposed" if transposed else "4x4"][:2]
    assert torch.equal(mine(x, weight, **how), plain(x, weight, **how))
    assert not calls


@pytest.mark.parametrize(
    "shape", [(3, 16, 4, 4), (16, 9, 9), (64, 16, 3, 8)], ids=["few_pixels", "no_batch", "odd"]
)
def test_other_images_are_torchs(shape, calls) -> None:
    x, weight, wide = rand(*shape), rand(16, 16, 3, 3), rand(16, 16, 4, 4)
    if shape[-2] != 3:
        assert torch.equal(ours(x, weight), torchs(x, weight))
    assert torch.equal(ops.conv2d(x, wide, None, 2, 1), F.conv2d(x, wide, None, 2, 1))
    padded = dict(stride=2, padding=1, output_padding=1)
    assert torch.equal(
        ops.conv_transpose2d(x, wide, **padded), F.conv_transpose2d(x, wide, **padded)
    )
    assert not calls


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(4, 4, 1), (3, 4, 1), (5, 5, 0), (9, 9, 0), (6, 8, 1)]
)
def test_images_that_tiles_fit_badly_are_torchs(
    height, width, expected, monkeypatch, calls
) -> None:
    monkeypatch.setattr(module, "CONV4X4", module.CONV4X4._replace(waste=CONV4X4.waste))
    weight = rand(16, 16, 4, 4)
    ops.conv2d(rand(4, 16, 2 * height, 2 * width), weight, None, 2, 1)
    ops.conv_transpose2d(rand(16, 16, height, width), weight, None, 2, 1)
    assert len(calls) == 2 * expected


@pytest.mark.parametrize(
    "how", [{"padding": "same"}, {"padding": (1, 1), "stride": (1, 1), "dilation": [1, 1]}], ids=str
)
def test_other_words_for_the_same(how, calls) -> None:
    x, weight = rand(4, 16, 4, 5), rand(16, 16, 3, 3)
    torch.testing.assert_close(ops.conv2d(x, weight, **how), torchs(x, weight))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_for_any_number_of_threads(kind) -> None:
    mine, _, how = KINDS[kind]
    weight = rand(48, 48, int(kind[0]), int(kind[0])).float()
    before = torch.get_num_threads()
    try:
        # Few tiles, which threads share by outputs, and many, which they share by tiles.
        for size in (10, 40, 240):
            x, results = rand(1, 48, size, size).float(), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                leaves = [t.detach().requires_grad_() for t in (x, weight)]
                y = mine(*leaves, **how)
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
        (rand(1, 18, 4, 4), rand(16, 16, 3, 3), None),
        (rand(4, 16, 4, 4), rand(16, 16, 3, 3), rand(11)),
        (rand(1, 16, 4, 4), rand(16, 16, 3, 3).float(), None),
        (rand(16, 4), rand(16, 16, 3, 3), None),
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
    x, weight = rand(4, 16, 4, 4).float(), rand(16, 16, 3, 3).float()
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
    x, weight = rand(4, 16, 4, 4).requires_grad_(), rand(16, 16, 3, 3)
    found = aigc_fast.explain(ops.conv2d, x, weight, padding=1)
    assert found.implementation == "cpu" and "conv3x3" in found.reason
    assert aigc_fast.explain(ops.conv2d, x, weight).implementation == "torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 9, 17), (1, 3, 2, 2), (0, 16, 4, 4)], ids=str)
def test_memory_order_of_torchs(shape, dtype) -> None:
    y = channels_last(rand(*shape).to(dtype)).requires_grad_()
    x, weight = rand(*shape).to(dtype), rand(4, 4, 3, 3)
    planes = module.in_torch_order(y, x, weight)
    assert planes.is_contiguous() and planes.equal(y)
    (planes * x).sum().backward()
    assert y.grad.equal(x)
    kept = channels_last(rand(2, 4, 3, 3))
    assert module.in_torch_order(y, kept, weight) is y
    assert module.in_torch_order(y, x, kept) is y


@pytest.mark.parametrize("padding", [1.0, True])
def test_what_torch_refuses_is_refused(padding) -> None:
    x, weight = rand(4, 16, 4, 4), rand(16, 16, 3, 3)
    with pytest.raises(TypeError):
        ops.conv2d(x, weight, padding=padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("transposed", "shape", "kernel", "how"),
    [
        (False, (2, 6, 9, 7), (8, 6, 1, 1), {}),
        (False, (2, 6, 9, 7), (9, 2, 3, 5), {"stride": 2, "padding": (1, 2), "groups": 3}),
        (False, (1, 4, 8, 8), (4, 4, 3, 3), {"padding": "same", "dilation": 2}),
        (True, (2, 6, 5, 7), (6, 2, 3, 3), {"stride": 2, "output_padding": 1, "groups": 2}),
    ],
)
def test_in_float32_where_torch_has_no_products(
    transposed, shape, kernel, how, dtype, monkeypatch
) -> None:
    functions = importlib.import_module("aigc_fast.ops.conv2d")
    monkeypatch.setattr(functions, "torch_multiplies", lambda asked: asked is not dtype)
    ours, torchs = (
        (ops.conv_transpose2d, F.conv_transpose2d) if transposed else (ops.conv2d, F.conv2d)
    )
    channels = kernel[1] * how["groups"] if transposed else kernel[0]
    low = [rand(*s, seed=i).to(dtype) for i, s in enumerate((shape, kernel, (channels,)))]
    wide = [t.float().requires_grad_() for t in low]
    low = [t.requires_grad_() for t in low]
    y, expected = ours(*low, **how), torchs(*wide, **how)
    assert torch.equal(y, expected.to(dtype))
    grads = torch.autograd.grad(y.float().square().sum(), low)
    wanted = torch.autograd.grad(expected, wide, 2 * y.detach().float())
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.to(dtype))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel", "how"),
    [
        ((2, 5, 4, 3), (7, 5, 3, 3), {"padding": 1}),
        ((1, 6, 9, 8), (4, 6, 3, 5), {"stride": (2, 3), "padding": (0, 2)}),
        ((3, 4, 7, 7), (5, 4, 3, 3), {"dilation": 2, "stride": [2, 2]}),
        ((2, 8, 3, 4), (6, 8, 1, 1), {}),
    ],
)
def test_few_outputs_are_a_product(shape, kernel, how, dtype, with_bias, monkeypatch) -> None:
    unfolded = importlib.import_module("aigc_fast.ops._unfolded")
    monkeypatch.setattr(unfolded, "_most_outputs", lambda weight, dtype: 24)
    calls: list = []
    monkeypatch.setattr(unfolded, "linear", lambda *args: calls.append(args) or F.linear(*args))
    low = [rand(*shape).to(dtype), rand(*kernel, seed=1).to(dtype)]
    low.append(rand(kernel[0], seed=2).to(dtype) if with_bias else None)
    exact = derivatives(partial(F.conv2d, **how), *(t if t is None else t.double() for t in low))
    plain = derivatives(partial(F.conv2d, **how), *low)
    mine = derivatives(partial(ops.conv2d, **how), *low)
    assert calls and [t.shape for t in mine] == [t.shape for t in plain]
    assert_as_good_as_torch(mine, plain, exact, dtype)
    del calls[:]
    many = torch.cat([low[0]] * 4)  # more outputs than a product is for
    ops.conv2d(many, *low[1:], **how)
    assert not calls


@pytest.mark.skipif(not linear.lags(torch.float32), reason="torch's products are as fast here")
def test_which_outputs_are_few() -> None:
    for channels, batch, size, few in [(384, 2, 8, True), (384, 3, 8, False), (288, 2, 8, False)]:
        x, weight = torch.empty(batch, channels, size, size), torch.empty(channels, channels, 3, 3)
        found = str(aigc_fast.explain(ops.conv2d, x, weight, None, 2, 1))
        assert ("linear_product" in found) == few, (channels, batch, found)


@pytest.mark.parametrize(
    "how",
    [{"stride": 0}, {"stride": (0, 1)}, {"padding": -1}, {"dilation": (0, 1)}, {"padding": "x"}],
    ids=str,
)
def test_torchs_errors_where_outputs_are_few(how, monkeypatch) -> None:
    unfolded = importlib.import_module("aigc_fast.ops._unfolded")
    monkeypatch.setattr(unfolded, "_most_outputs", lambda weight, dtype: 24)
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    errors = []
    for function in (ops.conv2d, F.conv2d):
        with pytest.raises((RuntimeError, ValueError)) as error:
            function(x, weight, **how)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]

"""Upsampling and convolution as one: the two calls in a row are the oracle."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples.sample import channels_last, rand
from tests.ops.test_every_op import assert_as_good_as_torch

CASES = {
    "3x3": ((2, 24, 7, 5), (16, 24, 3, 3)),
    "one_channel": ((50, 1, 1, 1), (1, 1, 3, 3)),
    "5x1": ((2, 6, 4, 9), (7, 6, 5, 1)),
    "1x1": ((3, 5, 2, 3), (4, 5, 1, 1)),
    "no_batch": ((0, 4, 5, 5), (6, 4, 3, 3)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULE = importlib.import_module("aigc_fast.ops.upsample_conv2d")


@pytest.fixture(params=[0, 10**9], ids=["folded", "upsampled_first"], autouse=True)
def way(request, monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "_PIXELS", request.param)


def two_calls(x, weight, bias=None):
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding="same")


def with_gradients(function, x, weight, bias):
    variables = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*variables)
    upstream = rand(*y.shape, seed=5).to(y.dtype)
    return [y, *torch.autograd.grad(y, variables, upstream)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_the_two_calls(case, dtype, layout) -> None:
    shape, kernel = CASES[case]
    inputs = [rand(*shape), rand(*kernel, seed=1), rand(kernel[0], seed=2)]
    low = [t.to(dtype) for t in inputs]
    low[0] = low[0].to(memory_format=layout)
    exact = with_gradients(two_calls, *(t.double() for t in low))
    plain = with_gradients(two_calls, *low)
    mine = with_gradients(ops.upsample_conv2d, *low)
    assert [t.shape for t in mine] == [t.shape for t in plain]
    assert_as_good_as_torch(mine, plain, exact, dtype)


def test_derivatives_in_float64() -> None:
    inputs = [rand(2, 2, 3, 2), rand(3, 2, 3, 3, seed=1), rand(3, seed=2)]
    inputs = [t.requires_grad_() for t in inputs]
    torch.testing.assert_close(ops.upsample_conv2d(*inputs), two_calls(*inputs))
    assert torch.autograd.gradcheck(ops.upsample_conv2d, inputs)
    assert torch.autograd.gradgradcheck(ops.upsample_conv2d, inputs)


def test_compiles_whole() -> None:
    x, weight = rand(2, 3, 4, 4).float(), rand(5, 3, 3, 3, seed=1).float()
    compiled = torch.compile(ops.upsample_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), ops.upsample_conv2d(x, weight))


def test_under_autocast() -> None:
    x, weight = channels_last(rand(2, 3, 4, 4)).to(torch.bfloat16), rand(5, 3, 3, 3, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, plain = ops.upsample_conv2d(x, weight), two_calls(x, weight)
    exact = two_calls(x.double(), weight.double())
    assert_as_good_as_torch([mine], [plain], [exact], torch.bfloat16)


def test_without_data() -> None:
    x, weight = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(6, 3, 3, 3, device="meta")
    assert ops.upsample_conv2d(x, weight).shape == (2, 6, 8, 10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": rand(3, 4, 4)}, ValueError, "x must have 4 dimensions"),
        ({"x": rand(1, 3, 4, 4).int()}, TypeError, "x must be float64"),
        ({"weight": rand(5, 3, 3, 3).float()}, TypeError, "weight must have the dtype of x"),
        ({"weight": rand(5, 2, 3, 3)}, ValueError, r"weight must have the channels of x \(3\)"),
        ({"weight": rand(5, 3, 2, 3)}, ValueError, "weight must have a kernel of odd size"),
        ({"bias": rand(4)}, ValueError, r"bias must have shape \(5,\)"),
    ],
    ids=["dims", "dtype", "weight_dtype", "channels", "even", "bias"],
)
def test_refuses(change, error, message) -> None:
    arguments = {"x": rand(1, 3, 4, 4), "weight": rand(5, 3, 3, 3), "bias": rand(5), **change}
    with pytest.raises(error, match=message):
        ops.upsample_conv2d(**arguments)

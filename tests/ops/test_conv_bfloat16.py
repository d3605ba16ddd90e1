"""The 4x4 convolution with stride 2 in bfloat16: torch's results and derivatives."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from aigc_fast.ops import _conv_bfloat16 as module
from aigc_fast.ops._winograd import convolve
from tests.op_samples.sample import channels_last, rand
from tests.ops.test_every_op import assert_as_good_as_torch
from tests.ops.test_linear import derivatives

HOW = {"stride": 2, "padding": 1}
#: Batch, channels, outputs, height and width. Where both channels are multiples of 16 the gradient
#: of the weight is our kernel's: of rows with an odd output, of several images at a time and in the
#: end fewer, of whole groups and others. The last one is a product of matrices.
SHAPES = {
    "image": (3, 3, 20, 8, 12),
    "maps": (2, 40, 24, 10, 6),
    "one_output": (2, 20, 1, 4, 2),
    "odd_rows": (2, 48, 32, 10, 6),
    "smallest": (3, 16, 16, 2, 2),
    "many_images": (37, 80, 144, 8, 8),
    "large_images": (2, 64, 16, 64, 66),
    "large_weight": (2, 256, 260, 4, 6),
}


@pytest.fixture
def calls(monkeypatch):
    """How often operators that are ours are asked for an output, on any processor."""
    asked = []

    def counted(*args):
        asked.append(args)
        return module._conv(*args)

    monkeypatch.setattr(module, "has_bfloat16_instructions", lambda: True)
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr(module, "KIND", module.KIND._replace(conv=counted))
    return asked


@pytest.mark.parametrize("layout", [lambda t: t, channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_is_torchs(name, transposed, with_bias, layout) -> None:
    batch, channels, outs, height, width = SHAPES[name]
    weight = rand(outs, channels, 4, 4, seed=1, scale=(16 * channels) ** -0.5)
    x = rand(batch, channels, height, width)
    if transposed:
        x = rand(batch, outs, height // 2, width // 2)
    bias = rand(channels if transposed else outs, seed=2) if with_bias else None
    low = [None if t is None else t.bfloat16() for t in (x, weight, bias)]
    low = [layout(low[0]), layout(low[1]), low[2]]
    torchs = partial(F.conv_transpose2d if transposed else F.conv2d, **HOW)
    mine = derivatives(partial(convolve, module.KIND, transposed), *low)
    exact = derivatives(torchs, *(None if t is None else t.double() for t in low))
    assert_as_good_as_torch(mine, derivatives(torchs, *low), exact, torch.bfloat16)


@pytest.mark.skipif(not module._has_kernel(), reason="oneDNN's sums differ with the threads")
def test_the_same_bits_for_any_number_of_threads() -> None:
    grad, x = rand(5, 112, 4, 6).bfloat16(), rand(5, 80, 8, 12).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 8, 40):
            torch.set_num_threads(count)
            found.append(module._weight_gradient(grad, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_autocast_has_it(name, calls) -> None:
    """Results and gradients in the dtypes of torch's; gradients of any strides."""
    x, weight = rand(2, 20, 4, 4).float(), rand(20, 20, 4, 4, seed=1).float()
    found = []
    for namespace in (ops, F):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            y = getattr(namespace, name)(*inputs, **HOW)
        found.append([y, *torch.autograd.grad(y.sum(), inputs)])
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
    assert len(calls) == 1


def test_others_are_torchs(calls, monkeypatch) -> None:
    x, weight = rand(2, 20, 4, 4).bfloat16(), rand(20, 20, 4, 4).bfloat16().requires_grad_()
    conv = partial(ops.conv2d, **HOW)
    for args in (
        (x, weight.detach()),  # no derivative is wanted
        (x.half(), weight.half()),
        (x[:0], weight),
        (x[:, :, 1:], weight),
        (x, weight[:, :, 1:, 1:]),
    ):
        conv(*args)
    torch.func.vmap(conv, in_dims=(0, None))(x[:, None], weight)
    torch.compile(conv, fullgraph=True, backend="eager")(x, weight)
    with torch.autocast("cpu", torch.float16):
        conv(x, weight)
    with pytest.raises(RuntimeError):
        conv(x, weight.float())
    assert not calls
    winograd = importlib.import_module("aigc_fast.ops._winograd")
    monkeypatch.setattr(winograd, "_most_pixels", lambda kind, dtype: 0)
    conv(x, weight)
    assert len(calls) == 1

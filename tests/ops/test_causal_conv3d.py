"""ops.causal_conv3d beside torch's conv3d of a padded copy."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import nn, ops
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def padded(
    x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0), dilation=(1, 1, 1), groups=1,
    history=None,
):  # fmt: skip
    missing = (weight.shape[2] - 1) * dilation[0]
    past = x.new_zeros(*x.shape[:2], missing, *x.shape[3:])
    if history is not None:
        past = torch.cat([past, history], 2)
    past = past[:, :, past.shape[2] - missing :]
    return F.conv3d(torch.cat([past, x], 2), weight, bias, stride, (0, *padding), dilation, groups)


def test_every_stride_dilation_and_history() -> None:
    choices = (1, 2), (1, 2, 5), (1, 2, 3, 4), (1, 2, 3), (1, 2), (None, 0, 1, 2, 7), (1, 3)
    for batch, frames, taps, stride, dilation, past, size in itertools.product(*choices):
        x, bias = rand(batch, 4, frames, 6, 5), rand(6, seed=2)
        weight = rand(6, 2, taps, size, size, seed=1)
        history = None if past is None else rand(batch, 4, past, 6, 5, seed=3)
        how = (stride, 1, 2), (size // 2, 1), (dilation, 1, 1), 2, history
        torch.testing.assert_close(
            ops.causal_conv3d(x, weight, bias, *how), padded(x, weight, bias, *how)
        )


def with_gradients(function, tensors, how):
    variables = [t.clone().requires_grad_() for t in tensors]
    *args, history = variables
    y = function(*args, padding=(1, 1), history=history, **how)
    return [y, *torch.autograd.grad(y, variables, rand(*y.shape, seed=5).to(y.dtype))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5])
def test_is_as_good_as_torch(frames, batch, dtype, layout) -> None:
    """At channels and pixels for which conv2d has products of its own."""
    shapes = (batch, 32, frames, 20, 18), (48, 32, 3, 3, 3), (48,), (batch, 32, 2, 20, 18)
    tensors = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    tensors[1] *= (27 * 32) ** -0.5
    low = [t.to(dtype) for t in tensors]
    low[:2] = (t.to(memory_format=layout) for t in low[:2])
    exact = with_gradients(padded, [t.double() for t in low], {})
    plain = with_gradients(padded, low, {})
    mine = with_gradients(ops.causal_conv3d, low, {})
    assert_as_good_as_torch(mine, plain, exact, dtype)


def test_derivatives_in_float64() -> None:
    inputs = [rand(2, 2, 3, 2, 3), rand(3, 2, 3, 3, 1, seed=1), rand(3, seed=2)]
    inputs = [t.requires_grad_() for t in (*inputs, rand(2, 2, 1, 2, 3, seed=3))]

    def call(x, weight, bias, history):
        return ops.causal_conv3d(x, weight, bias, (2, 1, 1), (1, 0), history=history)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_parts_of_a_stream_are_the_whole() -> None:
    x, conv = rand(2, 16, 7, 9, 8).float(), nn.CausalConv3d(16, 16, 3, padding=1)
    whole, parts, start = conv(x), [], 0
    for size in (1, 2, 1, 3):
        parts.append(conv(x[:, :, start : start + size], x[:, :, max(start - 2, 0) : start]))
        start += size
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    assert conv(x[:, :, :0].new_zeros(0, 16, 2, 9, 8)).shape == (0, 16, 2, 9, 8)


def test_module_is_torchs_with_padding_in_front() -> None:
    ours = nn.CausalConv3d(4, 6, (2, 3, 1), (1, 2, 1), (1, 0), bias=False, dtype=torch.float64)
    torchs = torch.nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), (0, 1, 0), bias=False)
    torchs.double().load_state_dict(ours.state_dict())
    x = rand(2, 4, 3, 7, 5)
    torch.testing.assert_close(ours(x), torchs(F.pad(x, (0, 0, 0, 0, 1, 0))))


def test_compiles_whole() -> None:
    x, weight = rand(2, 16, 4, 8, 8).float(), rand(16, 16, 3, 3, 3, seed=1).float()
    compiled = torch.compile(ops.causal_conv3d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, weight, padding=1), ops.causal_conv3d(x, weight, padding=1)
    )


def test_autocast() -> None:
    x, weight = rand(1, 3, 4, 8, 8).float(), rand(5, 3, 3, 3, 3, seed=1).float()
    low = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (f(low, weight, padding=(1, 1)) for f in (ops.causal_conv3d, padded))
    exact = padded(low.double(), weight.bfloat16().double(), padding=(1, 1))
    assert_as_good_as_torch([ours], [plain], [exact], torch.bfloat16)


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "x", {"x": torch.ones(1, 2, 3, 4)}),
        (ValueError, "x", {"x": torch.ones(1, 2, 0, 3, 3)}),
        (ValueError, "weight", {"weight": torch.ones(2, 2, 3, 3)}),
        (TypeError, "weight", {"weight": torch.ones(2, 2, 1, 1, 1).half()}),
        (ValueError, "bias", {"bias": torch.ones(3)}),
        (ValueError, "history", {"history": torch.ones(1, 2, 2, 3, 4)}),
        (ValueError, "stride", {"stride": 0}),
        (ValueError, "dilation", {"dilation": (1, 0, 1)}),
    ],
)
def test_refuses(error, name, change) -> None:
    args: dict = {"x": torch.ones(1, 2, 2, 3, 3), "weight": torch.ones(2, 2, 1, 1, 1)}
    with pytest.raises(error, match=f"^{name} must"):
        ops.causal_conv3d(**(args | change))

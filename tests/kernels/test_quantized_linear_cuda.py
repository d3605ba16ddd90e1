"""The CUDA kernels of quantized_linear, run thread by thread on the CPU (cuda_on_cpu.h)."""

import ctypes

import pytest
import torch
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops import _registry
from tests.kernels.cuda_on_cpu import DTYPES, build
from tests.op_samples import rand
from tests.ops.test_every_op import assert_as_good_as_torch


class Arguments(ctypes.Structure):
    """struct QuantizedGemv"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "x", "x_scales", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("tile_bytes", "x_row_bytes")),
        *((name, ctypes.c_int) for name in ("rows", "out_features", "tiles", "x_pieces")),
        *((n, ctypes.c_int) for n in ("groups", "group_runs", "group_steps", "block_bytes")),
        ("has_minimum", ctypes.c_bool),
        ("type", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build("quantized_linear", tmp_path_factory)


def run(library, x, weight, bias, *, bits, group_size, out_features, quantize_activations=False):
    rows, in_features = x.shape
    tiles, groups, block_bytes = weight.shape
    out = x.new_empty(rows, out_features)
    p = Arguments(
        weight.data_ptr(), x.data_ptr(), None, None if bias is None else bias.data_ptr(),
        out.data_ptr(), groups * block_bytes, 0, rows, out_features, tiles, 0, groups, 0, 0,
        block_bytes, block_bytes == 2 * group_size * bits + 64, DTYPES[x.dtype],
    )  # fmt: skip
    sizes = [0 if t is None else t.nbytes for t in (x, weight, bias, out)]
    library.run(
        p, bits, in_features, group_size, quantize_activations, (ctypes.c_int64 * 4)(*sizes)
    )
    return out


# rows, out_features, in_features, bits, group_size, symmetric, bias
SHAPES = [
    (1, 32, 64, 4, 32, True, False),
    (8, 48, 96, 4, 32, False, True),
    (3, 17, 1344, 4, 64, False, False),  # more stages than the warps have room for
    (2, 5, 24, 4, 8, True, True),
    (5, 33, 200, 4, 40, False, False),
    (1, 16, 512, 4, 512, False, False),
    (4, 16, 44, 4, 48, True, False),
    (1, 64, 1120, 8, 32, True, True),
    (6, 16, 352, 8, 32, False, False),
    (2, 16, 24, 8, 4, False, False),
    (7, 40, 168, 8, 12, True, True),
    (2, 5, 37, 8, 40, True, True),
]


def call(rows, out_features, in_features, bits, group_size, symmetric, bias, dtype):
    groups = -(-in_features // group_size)
    dense = torch.zeros(out_features, groups * group_size)
    dense[:, :in_features] = rand(out_features, in_features, scale=0.1)
    weight = ops.quantize_weight(dense, bits, group_size, symmetric=symmetric)
    x = rand(rows, in_features, seed=1).to(dtype)
    kwargs = dict(bits=bits, group_size=group_size, out_features=out_features)
    return x, weight, rand(out_features, seed=2).to(dtype) if bias else None, kwargs


@pytest.mark.parametrize("quantize_activations", [False, True], ids=["as_they_are", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(library, shape, dtype, quantize_activations) -> None:
    x, weight, bias, kwargs = call(*shape, dtype)
    kwargs["quantize_activations"] = quantize_activations
    with aigc_fast.backend("reference"):
        wide = None if bias is None else bias.double()
        exact = ops.quantized_linear(x.double(), weight, wide, **kwargs)
        plain = ops.quantized_linear(x, weight, bias, **kwargs)
    ours = run(library, x, weight, bias, **kwargs)
    assert_as_good_as_torch([ours], [plain], [exact], dtype)


@pytest.mark.parametrize("quantize_activations", [False, True], ids=["as_they_are", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_among_any_others(library, dtype, quantize_activations) -> None:
    x, weight, bias, kwargs = call(8, 16, 384, 4, 32, False, True, dtype)
    kwargs["quantize_activations"] = quantize_activations
    whole = run(library, x, weight, bias, **kwargs)
    for begin, end in [(0, 1), (2, 5), (7, 8)]:
        assert torch.equal(run(library, x[begin:end], weight, bias, **kwargs), whole[begin:end])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(library, dtype, value) -> None:
    x, _, _, _ = call(3, 16, 64, 8, 32, False, False, dtype)
    # No weight is zero, which would make NaN of infinity.
    dense = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) + 1
    weight = ops.quantize_weight(dense, 8, 32)
    x[1, 40] = value
    kwargs = dict(bits=8, group_size=32, out_features=16)
    with aigc_fast.backend("reference"):
        want = ops.quantized_linear(x, weight, **kwargs)
    got = run(library, x, weight, None, **kwargs)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02, equal_nan=True)


def test_which_calls_the_cuda_kernel_takes() -> None:
    supports = _registry.OPS["quantized_linear"]._cuda_supports
    assert supports is not None

    def takes(x: Tensor, weight: Tensor) -> bool:
        return supports(x, weight, None, 4, 32, 32, False)

    weight = torch.zeros(2, 2, 288, dtype=torch.uint8)
    for shape in [(64,), (2, 4, 64), (1, 64)]:
        assert takes(torch.zeros(shape, dtype=torch.half), weight)
    assert takes(torch.zeros(64, 8).t(), weight)
    assert not takes(torch.zeros(9, 64), weight) and not takes(torch.zeros(0, 64), weight)
    assert not takes(torch.zeros(1, 64, dtype=torch.float64), weight)
    offset = torch.zeros(2 * 2 * 288 + 1, dtype=torch.uint8)[1:].view(2, 2, 288)
    assert not takes(torch.zeros(64), offset)
    assert not takes(torch.zeros(64), torch.zeros(2, 2, 576, dtype=torch.uint8)[..., ::2])

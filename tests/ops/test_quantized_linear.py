"""The formats of quantised weights, and what the table of samples does not say of their op."""

import pytest
import torch

from aigc_fast import ops
from tests.op_samples import rand

# (out_features, in_features, bits, group_size): whole tiles, part of one, one column, odd columns
FORMATS = [
    (16, 32, 4, 32),
    (37, 96, 4, 32),
    (1, 8, 4, 8),
    (129, 128, 4, 64),
    (17, 256, 4, 128),
    (5, 13, 4, 13),
    (33, 64, 8, 32),
    (16, 24, 8, 4),
    (3, 37, 8, 37),
    (1, 1, 8, 1),
]


def round_trip(codes, scales, minimums, bits, group_size):
    rows, columns = codes.shape
    packed = ops.pack_weight(codes, scales, minimums, bits)
    padded = -(-group_size // (32 // bits)) * (32 // bits)
    block = 16 * (padded * bits // 8 + (2 if minimums is None else 4))
    assert packed.shape == (-(-rows // 16), columns // group_size, block)
    return packed, ops.dequantize_weight(packed, bits, padded, rows, columns)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "bits", "group_size"), FORMATS)
def test_packing_loses_nothing(rows, columns, bits, group_size, symmetric) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(rows, columns // group_size).half()
    minimums = None if symmetric else -torch.rand(scales.shape).half()
    _, found = round_trip(codes, scales, minimums, bits, group_size)
    step = scales.float().repeat_interleave(group_size, 1)
    if symmetric:
        assert torch.equal(found, (codes.float() - 2 ** (bits - 1)) * step)
    else:
        assert torch.equal(found, codes * step + minimums.repeat_interleave(group_size, 1))


def test_the_layout_is_what_the_kernels_read() -> None:
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    scales = torch.rand(32, 2).half()
    packed = ops.pack_weight(codes, scales, scales + 1, 4)
    tile, group, row, run, column = 1, 1, 5, 2, 3
    byte = packed[tile, group, run * 64 + row * 4 + column]
    at = group * 32 + run * 8 + column
    assert byte == codes[tile * 16 + row, at] | codes[tile * 16 + row, at + 4] << 4
    halves = packed[tile, group, 256:].view(torch.float16)
    assert halves[row] == scales[21, 1] and halves[16 + row] == (scales + 1)[21, 1]
    packed = ops.pack_weight(codes, scales, None, 8)
    assert packed[1, 1, 3 * 64 + 5 * 4 + 2] == codes[21, 32 + 3 * 4 + 2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "bits", "group_size"), FORMATS)
def test_padding_is_zero(rows, columns, bits, group_size, symmetric) -> None:
    weight = ops.quantize_weight(rand(rows, columns), bits, group_size, symmetric=symmetric)
    padded = -(-group_size // (32 // bits)) * (32 // bits)
    tiles, groups, _ = weight.shape
    whole = ops.dequantize_weight(weight, bits, padded, 16 * tiles, groups * padded)
    assert not whole[rows:].any()
    if symmetric:
        assert not whole[:, columns:].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "bits", "group_size"), FORMATS)
def test_quantizing_is_off_by_half_a_step(rows, columns, bits, group_size, symmetric) -> None:
    weight = rand(rows, columns, scale=0.1).float()
    packed = ops.quantize_weight(weight, bits, group_size, symmetric=symmetric)
    padded = -(-group_size // (32 // bits)) * (32 // bits)
    found = ops.dequantize_weight(packed, bits, padded, rows, columns)
    grouped = weight.view(rows, -1, group_size)
    low, high = grouped.aminmax(dim=-1)
    largest = grouped.abs().amax(-1)
    step = largest / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    # fp16 keeps scale and minimum to a 2048th: all steps and the minimum may move by that.
    half = step / 2 * (1 + 2**-11)
    if not symmetric:
        half = torch.maximum(half, (step * (2**bits - 1) + low.abs()) / 2048) + low.abs() / 2048
    error = (found - weight).view(rows, -1, group_size).abs().amax(-1)
    assert (error <= half + 2**-22 * largest).all()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_values_on_the_grid_are_kept(bits, symmetric) -> None:
    low = 1 - 2 ** (bits - 1) if symmetric else 0
    steps = torch.randint(low, 2 ** (bits - 1) if symmetric else 2**bits, (19, 4, 32)).float()
    steps[..., 0], steps[..., 1] = low, (2 ** (bits - 1) if symmetric else 2**bits) - 1
    weight = steps * 2.0 ** -torch.arange(4)[:, None] - (0 if symmetric else 3)
    packed = ops.quantize_weight(weight.view(19, 128), bits, 32, symmetric=symmetric)
    assert torch.equal(ops.dequantize_weight(packed, bits, 32, 19, 128), weight.view(19, 128))


@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_groups_are_kept(symmetric) -> None:
    weight = torch.zeros(16, 64)
    weight[:, 32:] = 0.5 * (not symmetric)
    packed = ops.quantize_weight(weight, 4, 32, symmetric=symmetric)
    assert torch.equal(ops.dequantize_weight(packed, 4, 32, 16, 64), weight)


def test_refuses_what_does_not_fit() -> None:
    codes, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 2)
    with pytest.raises(ValueError, match="scales must be"):
        ops.pack_weight(codes, scales[:8], None, 4)
    with pytest.raises(ValueError, match="scales must be"):
        ops.pack_weight(codes[:, :40], scales, None, 4)
    with pytest.raises(ValueError, match="minimums must have the shape of scales"):
        ops.pack_weight(codes, scales, scales[:, :1], 4)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        ops.quantize_weight(torch.ones(16, 64), 5, 32)
    with pytest.raises(ValueError, match="group_size must divide"):
        ops.quantize_weight(torch.ones(16, 64), 4, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_activations_cost_little(dtype) -> None:
    """Half a step of 127 of each group's largest, times the weights, adds up as noise does."""
    weight = ops.quantize_weight(rand(64, 576, scale=0.05), 4, 32, symmetric=False)
    x = rand(4, 576, seed=1).to(dtype)
    kwargs = dict(bits=4, group_size=32, out_features=64)
    plain = ops.quantized_linear(x, weight, **kwargs).float()
    rounded = ops.quantized_linear(x, weight, **kwargs, quantize_activations=True).float()
    assert (rounded - plain).norm() <= 0.01 * plain.norm()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((4, 32, 20, 64), "packed must have shape"),
        ((4, 16, 8, 64), "packed must have shape"),
        ((8, 32, 8, 64), "packed must have shape"),
        ((4, 32, 8, 128), "in_features must be that of packed, 64"),
        ((4, 32, 8, 60), "in_features must be that of packed, 64, got 60"),
        ((5, 32, 8, 64), "bits must be 4 or 8"),
    ],
)
def test_refuses_a_packed_weight_of_another_format(arguments, match) -> None:
    packed = ops.quantize_weight(torch.randn(8, 64), 4, 32)
    with pytest.raises(ValueError, match=match):
        ops.dequantize_weight(packed, *arguments)


def test_refuses_codes_of_more_bits() -> None:
    codes, scales = torch.full((8, 64), 16, dtype=torch.uint8), torch.ones(8, 2)
    with pytest.raises(ValueError, match="codes must be below 16"):
        ops.pack_weight(codes, scales, None, 4)
    with pytest.raises(TypeError, match="codes must be uint8"):
        ops.pack_weight(codes.int(), scales, None, 8)


@pytest.mark.parametrize("size", [1e-38, 3e-37, 4e-37, 1e-45])
def test_tiny_activations_as_codes(size) -> None:
    """127 / max|x| has no float32 below 3.7e-37: the codes are 0 there."""
    packed = ops.quantize_weight(torch.randn(32, 64), 4, 32)
    x = torch.full((1, 64), size)
    y = ops.quantized_linear(
        x, packed, bits=4, group_size=32, out_features=32, quantize_activations=True
    )
    want = x.double() @ ops.dequantize_weight(packed, 4, 32, 32, 64, torch.float64).T
    assert ((y - want).abs() <= 64 * 4e-37 + want.abs() * 1e-4).all()

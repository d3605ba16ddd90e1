"""Matrices of GGUF files as packed weights, against the package `gguf` itself."""

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from aigc_fast.io import GGUFTensor, pack_gguf
from aigc_fast.ops import dequantize_weight

EXACT = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 8, "Q5_1": 8, "Q8_0": 8}


def stored(weight: np.ndarray, name: str) -> GGUFTensor:
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quants.quantize(weight, kind).view(np.uint8)
    data.flags.writeable = False  # as a mapped file is
    return GGUFTensor("model.gguf", "w", weight.shape, name, data)


def random_blocks(rows: int, columns: int, name: str) -> GGUFTensor:
    """Blocks of K-quants, which gguf reads but does not write, with scales of ordinary size."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scales = rng.uniform(1e-5, 2e-4, (rows, columns // block, 2)).astype("<f2").view(np.uint8)
    at, count = {"Q6_K": (208, 2)}.get(name, (0, 4))
    data[..., at : at + count] = scales[..., :count]
    return GGUFTensor("model.gguf", "w", (rows, columns), name, data.reshape(rows, -1))


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    weight = np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)
    weight[0, :32] = 0
    return weight


def given_back(packed: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    return dequantize_weight(packed, bits, 32, *shape)


def assert_within_half_a_step(values: torch.Tensor, weight: torch.Tensor) -> None:
    """The bound that pack_gguf states for types it repacks to 8 bits."""
    error = (values - weight).abs().unflatten(1, (-1, 32)).amax(-1)
    largest = weight.abs().unflatten(1, (-1, 32)).amax(-1)
    # Half a step, its fp16 scale rounded (2^-26: denormal), and fp32's own rounding.
    limit = largest / 254 * (1 + 2**-11) + 2**-26 + largest * 2**-23
    assert (error <= limit.clamp(min=127 * 2**-25)).all()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(16, 32), (1, 96), (37, 64), (64, 576)], ids=str)
def test_keeps_the_values_of_the_file_bit_for_bit(name, shape) -> None:
    tensor = stored(gaussian(*shape), name)
    packed, bits = pack_gguf(tensor)
    assert bits == EXACT[name]
    theirs = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[name])
    ours = given_back(packed, bits, shape)
    assert torch.equal(ours.view(torch.int32), torch.from_numpy(theirs).view(torch.int32))


@pytest.mark.parametrize("name", EXACT)
def test_every_code_is_kept(name) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = np.random.default_rng(0).integers(0, 256, (19, 4, size), dtype=np.uint8)
    halves = 4 if name[-1] == "1" else 2
    data[..., :halves] = np.tile(np.array([0.25, -3], "<f2").view(np.uint8)[:halves], (19, 4, 1))
    tensor = GGUFTensor("model.gguf", "w", (19, 4 * block), name, data.reshape(19, -1))
    assert torch.equal(given_back(*pack_gguf(tensor), tensor.shape), tensor.dequantize())


def test_q4_k_rounds_scales_and_minimums_alone() -> None:
    tensor = random_blocks(21, 512, "Q4_K")
    packed, bits = pack_gguf(tensor)
    assert bits == 4
    error = (given_back(packed, bits, tensor.shape) - tensor.dequantize()).abs()
    # (tile, group, row): 15 steps and the minimum, each rounded to fp16.
    scales, minimums = packed[..., 256:].view(torch.float16).float().split(16, -1)
    limit = (15 * scales + minimums.abs()) * 2**-11 + 16 * 2**-25
    limit = limit.transpose(1, 2).flatten(0, 1)[:21]
    assert (error.unflatten(1, (-1, 32)).amax(-1) <= limit).all()
    assert error.max() > 0  # else the bound is not tested


@pytest.mark.parametrize("name", ["Q5_K", "Q6_K"])
def test_other_k_quants_become_8_bits(name) -> None:
    tensor = random_blocks(21, 512, name)
    packed, bits = pack_gguf(tensor)
    assert bits == 8
    assert_within_half_a_step(given_back(packed, bits, tensor.shape), tensor.dequantize())


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_become_8_bits(name, scale) -> None:
    tensor = stored(gaussian(37, 320) * np.float32(scale), name)
    packed, bits = pack_gguf(tensor)
    assert bits == 8
    assert_within_half_a_step(given_back(packed, bits, tensor.shape), tensor.dequantize())


@pytest.mark.parametrize("names", [("Q4_1",) * 3, ("Q4_0", "Q4_1"), ("Q8_0", "F32"), ("BF16",) * 2])
def test_several_matrices_and_an_order_of_rows(names) -> None:
    tensors = [stored(gaussian(20 + i, 64, i), name) for i, name in enumerate(names)]
    dense = torch.cat([tensor.dequantize() for tensor in tensors])
    rows = torch.randperm(len(dense))[:39]
    packed, bits = pack_gguf(tensors, rows)
    values = given_back(packed, bits, (39, 64))
    if names == ("Q4_1",) * 3:
        assert bits == 4 and torch.equal(values, dense[rows])
    else:
        assert bits == 8
        assert_within_half_a_step(values, dense[rows])


def test_widths_that_are_no_multiple_of_32_are_not_packed() -> None:
    assert pack_gguf(stored(gaussian(4, 40), "F32")) is None


def test_refuses_shapes_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="matrices of equal in_features"):
        pack_gguf([stored(gaussian(4, 32), "Q4_0"), stored(gaussian(4, 64), "Q4_0")])
    with pytest.raises(ValueError, match="matrices of equal in_features"):
        pack_gguf(stored(gaussian(4, 32)[0], "Q4_0"))

"""Matrices of GGUF files as packed weights of `ops.quantized_linear`, without a float between."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aigc_fast.io.gguf import GGUFTensor
from aigc_fast.ops import pack_weight, quantize_weight

#: Columns that share a scale in every weight that `pack_gguf` makes.
GROUP_SIZE = 32
_Parts = tuple[Tensor, Tensor, Tensor | None, int]


def pack_gguf(
    tensors: GGUFTensor | Sequence[GGUFTensor], rows: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """The weight (packed, bits) that `ops.quantized_linear` takes with group_size=32.

    tensors: matrices of equal in_features, one below the other.
    rows:    int64 indices: row i of the weight is row rows[i] of the matrices; None keeps all.

    What becomes of the values, by the type they are stored as:
        Q4_0, Q4_1, Q8_0  the file's own codes and scales: 4, 4 and 8 bits, no loss
        Q5_0, Q5_1        the file's own in 8 bits, no loss
        Q4_K              4 bits with minimums: scale and minimum of a group, products of two
                          numbers in the file, are rounded to fp16 (a 2048th of each at most)
        all others        8 bits by `quantize_weight`: off by at most half a step, that is 1/254
                          of the largest of the group. The fp16 scale adds a 2048th of that; in
                          groups whose largest is below 0.0078 it is denormal and adds 1.5e-8,
                          which below 0.001 may let the whole error reach 3.8e-6.
    Matrices of different types all become 8 bits by the last rule.

    Returns None where in_features is no multiple of 32 (possible for F32, F16 and BF16 alone).

    Raises ValueError for shapes that do not fit together and for types that the package `gguf`
    cannot dequantise.
    """
    tensors = [tensors] if isinstance(tensors, GGUFTensor) else tensors
    shapes = [tensor.shape for tensor in tensors]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"tensors must be matrices of equal in_features, got shapes {shapes}")
    if shapes[0][1] % GROUP_SIZE:
        return None
    kinds = {tensor.type_name for tensor in tensors}
    if len(kinds) == 1 and (decode := _DECODERS.get(kinds.pop())):
        data = torch.from_numpy(np.concatenate([tensor.data for tensor in tensors]))
        data = data if rows is None else data[rows]
        codes, scales, minimums, bits = decode(data)
        codes, scales = codes.view(len(data), -1), scales.view(len(data), -1)
        return pack_weight(codes, scales, minimums, bits), bits
    weight = torch.cat([tensor.dequantize() for tensor in tensors])
    weight = weight if rows is None else weight[rows]
    # In runs of whole tiles that stay in the caches.
    runs = weight.split(math.ceil(2**16 / weight.shape[1]) * 16)
    return torch.cat([quantize_weight(run, 8, GROUP_SIZE) for run in runs]), 8


# ---- codes, scales and minimums of each type (ggml-common.h has the structs) --------------------


def _halves(data: Tensor, at: int, block_bytes: int) -> Tensor:
    """The fp16 numbers `at` bytes into each block."""
    data = data.view(len(data), -1, block_bytes)[..., at : at + 2]
    return data.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(data: Tensor, at: int, block_bytes: int, width: int = 16) -> Tensor:
    """The codes of each run of `width` bytes: first their low nibbles, then their high ones."""
    data = data.view(len(data), -1, block_bytes)[..., at:]
    data = data.contiguous().unflatten(-1, (-1, width))
    return torch.stack([data & 15, data >> 4], -2)


def _fifth_bits(data: Tensor, at: int, block_bytes: int) -> Tensor:
    data = data.view(len(data), -1, block_bytes)[..., at : at + 4]
    return (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _q4_0(data: Tensor) -> _Parts:
    return _nibbles(data, 2, 18), _halves(data, 0, 18), None, 4


def _q4_1(data: Tensor) -> _Parts:
    return _nibbles(data, 4, 20), _halves(data, 0, 20), _halves(data, 2, 20), 4


def _q5_0(data: Tensor) -> _Parts:
    codes = _nibbles(data, 6, 22).flatten(-3) | _fifth_bits(data, 2, 22) << 4
    return codes + (128 - 16), _halves(data, 0, 22), None, 8


def _q5_1(data: Tensor) -> _Parts:
    codes = _nibbles(data, 8, 24).flatten(-3) | _fifth_bits(data, 4, 24) << 4
    return codes, _halves(data, 0, 24), _halves(data, 2, 24), 8


def _q8_0(data: Tensor) -> _Parts:
    codes = data.view(len(data), -1, 34)[..., 2:] ^ 128
    return codes.contiguous(), _halves(data, 0, 34), None, 8


def _q4_k(data: Tensor) -> _Parts:
    # Eight scales and eight minimums of 6 bits in 12 bytes.
    first, second, both = data.view(len(data), -1, 144)[..., 4:16].split(4, -1)
    scales = torch.cat([first & 63, both & 15 | (first >> 6) << 4], -1)
    minimums = torch.cat([second & 63, both >> 4 | (second >> 6) << 4], -1)
    scales = _halves(data, 0, 144).float().unsqueeze(-1) * scales
    minimums = _halves(data, 2, 144).float().unsqueeze(-1) * -minimums.float()
    codes = _nibbles(data, 16, 144, 32)
    return codes, scales.half(), minimums.half().flatten(1), 4


_DECODERS = {f.__name__[1:].upper(): f for f in (_q4_0, _q4_1, _q5_0, _q5_1, _q8_0, _q4_k)}

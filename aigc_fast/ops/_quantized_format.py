"""The layout of quantised weights, in and out of it, in plain PyTorch.

A weight (out_features, in_features) of b-bit codes becomes uint8 (tiles, groups, bytes): one tile
for 16 rows, in it one block for each group of columns, in that the codes of the 16 rows, their 16
scales and, for asymmetric weights, their 16 minimums, both fp16. Four columns of a row are four
bytes, so that 64 bytes are 16 rows; 4-bit codes hold the columns 0..3 of each 8 in the low nibbles,
4..7 in the high ones. A row of a tile is then one stream for whoever multiplies it.
"""

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_tensor, has_data, name_of
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._registry import FLOATS

TILE = 16


def pack_weight(codes: Tensor, scales: Tensor, minimums: Tensor | None, bits: int) -> Tensor:
    """The packed weight of codes (out_features, in_features).

    codes:    uint8, in [0, 2^bits); the code of zero is 2^(bits - 1), or, where there are
              minimums, codes count from the minimum: weight = code * scale + minimum.
    scales:   (out_features, groups), kept as float16; groups are equal runs of columns.
    minimums: the shape of scales, or None.
    bits:     4 or 8.

    Returns uint8 (ceil(out_features / 16), groups, bytes). in_features that are no multiple of the
    run of columns (8 for 4 bits, 4 for 8) are padded within a single group.

    Raises TypeError or ValueError for dtypes and shapes that do not fit together and for codes of
    more bits.
    """
    check_bits(bits)
    check_tensor("codes", codes, dtypes=(torch.uint8,), ndim=2)
    check_tensor("scales", scales, ndim=2)
    if bits == 4 and has_data(codes) and (codes > 15).any():
        raise ValueError("codes must be below 16 for 4 bits")
    rows, columns = codes.shape
    groups = scales.shape[1]
    run = 32 // bits
    if scales.shape[0] != rows or groups == 0 or (groups > 1 and columns % (groups * run)):
        raise ValueError(
            f"scales must be (out_features, groups) = ({rows}, groups), groups dividing in_features"
            f" = {columns} in multiples of {run}; got {tuple(scales.shape)}"
        )
    if minimums is not None and minimums.shape != scales.shape:
        raise ValueError(
            f"minimums must have the shape of scales {tuple(scales.shape)}, "
            f"got {tuple(minimums.shape)}"
        )
    zero = 0 if minimums is not None else 1 << (bits - 1)
    width = columns // groups if groups > 1 else -(-columns // run) * run
    tiles = -(-rows // TILE)
    whole = codes.new_full((tiles * TILE, groups * width), zero)
    whole[:rows, :columns] = codes
    # (tile, row, group, run, half) -> (tile, group, run, row, half), of words of 4 columns each:
    # twice as fast as moving bytes.
    words = whole.view(torch.int32).view(tiles, TILE, groups, width // run, run // 4)
    words = words.permute(0, 2, 3, 1, 4)
    packed = words[..., 0] if bits == 8 else words[..., 0] | words[..., 1] << 4
    block = [packed.contiguous().view(torch.uint8).view(tiles, groups, -1)]
    for values in (scales, minimums):
        if values is not None:
            halves = values.new_zeros((tiles * TILE, groups), dtype=torch.float16)
            halves[:rows] = values
            halves = halves.view(tiles, TILE, groups).transpose(1, 2).contiguous()
            block.append(halves.view(torch.uint8))
    return torch.cat(block, dim=2)


def check_packed(name: str, weight: Tensor, bits: int, group_size: int, out_features: int) -> None:
    """ValueError or TypeError unless `weight` is a packed one of that format."""
    check_bits(bits)
    check_group_size(group_size, bits)
    if out_features < 1:
        raise ValueError(f"out_features must be positive, got {out_features}")
    check_tensor(name, weight, dtypes=(torch.uint8,), ndim=3)
    tiles, groups, size = weight.shape
    block = TILE * (group_size * bits // 8 + 2)
    if groups == 0 or tiles != -(-out_features // TILE) or size not in (block, block + 2 * TILE):
        raise ValueError(
            f"{name} must have shape ({-(-out_features // TILE)}, groups, {block} or "
            f"{block + 2 * TILE}) for {out_features} out_features and groups of {group_size} "
            f"{bits}-bit codes, got {tuple(weight.shape)}"
        )


def check_in_features(
    what: str, in_features: int, weight: Tensor, bits: int, group_size: int
) -> None:
    """ValueError, `what` and which, unless a packed weight can have so many columns: a run of them
    is padded, and within a single group alone."""
    groups = weight.shape[1]
    most = groups * group_size
    least = most - (32 // bits - 1 if groups == 1 else 0)
    if not least <= in_features <= most:
        sizes = f"{most}" if least == most else f"{least} to {most}"
        raise ValueError(f"{what}, {sizes}, got {in_features}")


def check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")


def check_group_size(group_size: int, bits: int) -> None:
    run = 32 // bits
    if not 0 < group_size <= 65536 or group_size % run:
        raise ValueError(
            f"group_size must be a multiple of {run} up to 65536 for {bits} bits, got {group_size}"
        )


def dequantize_weight(
    packed: Tensor, bits: int, group_size: int, out_features: int, in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The weight (out_features, in_features) as numbers: code * scale + minimum where there are
    minimums, else (code - 2^(bits - 1)) * scale.

    packed:     uint8, from `pack_weight` or `quantize_weight`.
    bits, group_size, out_features, in_features: those of the weight that was packed.
    dtype:      of the result. Computes in float32 (float64 for float64) and rounds once.

    Raises TypeError or ValueError for a packed weight of another format or of other sizes.
    """
    check_packed("packed", packed, bits, group_size, out_features)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {', '.join(map(name_of, FLOATS))}, got {dtype}")
    tiles, groups, _ = packed.shape
    check_in_features("in_features must be that of packed", in_features, packed, bits, group_size)
    run = 32 // bits
    size = TILE * group_size * bits // 8
    accumulate = wide_dtype(dtype)
    codes = packed[..., :size].reshape(tiles, groups, group_size // run, TILE, 4)
    parts = [codes] if bits == 8 else [codes & 15, codes >> 4]
    # (tile, group, run, row, half, 4) -> (tile, row, group, column)
    values = torch.stack(parts, dim=4).permute(0, 3, 1, 2, 4, 5)
    values = values.reshape(tiles, TILE, groups, group_size).to(accumulate)
    halves = packed[..., size:].contiguous().view(torch.float16).to(accumulate)
    halves = halves.view(tiles, groups, -1, TILE).permute(2, 0, 3, 1).unsqueeze(-1)
    if halves.shape[0] == 2:
        values = values * halves[0] + halves[1]
    else:
        values = (values - (1 << (bits - 1))) * halves[0]
    return values.reshape(tiles * TILE, -1)[:out_features, :in_features].to(dtype)


def quantize_weight(
    weight: Tensor, bits: int, group_size: int | None = None, *, symmetric: bool = True
) -> Tensor:
    """Rounds a weight to the nearest code, group by group, and packs it.

    weight:     (out_features, in_features), floating.
    bits:       4 or 8.
    group_size: columns that share a scale, a divisor of in_features; None is all of them (one scale
                a row).
    symmetric:  True for scale = max|w| / (2^(bits - 1) - 1) and no minimums; False for codes that
                divide the range from the minimum to the maximum of each group evenly.

    Returns the packed weight, as `pack_weight` does.

    Raises TypeError or ValueError for a wrong dtype, shape, number of bits or group_size.
    """
    check_tensor("weight", weight, ndim=2)
    check_bits(bits)
    rows, columns = weight.shape
    group_size = columns if group_size is None else group_size
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size must divide in_features = {columns}, got {group_size}")
    grouped = weight.float().view(rows, -1, group_size)
    if symmetric:
        middle = 1 << (bits - 1)
        scales = (grouped.abs().amax(-1) / (middle - 1)).half()
        step = scales.float().unsqueeze(-1)
        codes = (grouped / step).nan_to_num(0, 0, 0).round().clamp(1 - middle, middle - 1) + middle
        return pack_weight(codes.view(rows, columns).to(torch.uint8), scales, None, bits)
    low, high = grouped.aminmax(dim=-1)
    scales, minimums = ((high - low) / ((1 << bits) - 1)).half(), low.half()
    step = scales.float().unsqueeze(-1)
    codes = ((grouped - minimums.float().unsqueeze(-1)) / step).nan_to_num(0, 0, 0)
    codes = codes.round().clamp(0, (1 << bits) - 1)
    return pack_weight(codes.view(rows, columns).to(torch.uint8), scales, minimums, bits)

"""A function of large images, made of that of overlapping tiles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Part(NamedTuple):
    """The rows (or columns) of a tile in the input and in the output, and the share that the tile
    has in each of the latter."""

    read: slice
    write: slice
    share: Tensor


def blend_tiles(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    unit: tuple[int, int],
) -> Tensor:
    """`run` of tiles of x (batch, channels, height, width), blended linearly where they overlap.

    run:     from (batch, channels, h, w) to (batch, any, h / unit[0] * unit[1], w / ...).
    unit:    tiles are placed in steps of unit[0] rows and columns of x, to which unit[1] of the
             result correspond. Rows and columns of x beyond a multiple belong to the last tile.
    tile, overlap: in units; tiles share `overlap` units, the last two of a row or column maybe
             more, so that all are of one size. An x that is no larger goes through `run` whole.

    result = sum of share * run(tile): a tile's share of an output is proportional to the product of
    its distances to the tile's border along height and width, each counted from half a pixel
    outside up to the overlap, and the shares of an output add up to one. Sums are in float32.
    """
    rows, columns = (_parts(x, dim, tile, overlap, unit) for dim in (2, 3))
    if len(rows) == len(columns) == 1:
        return run(x)
    height, width = rows[-1].write.stop, columns[-1].write.stop
    result = None
    for row in rows:
        for column in columns:
            y = run(x[:, :, row.read, column.read])
            if result is None:
                result = row.share.new_zeros(*y.shape[:2], height, width)
            result[:, :, row.write, column.write] += row.share[:, None] * column.share * y
    assert result is not None
    return result.to(y.dtype)


def _parts(x: Tensor, dim: int, tile: int, overlap: int, unit: tuple[int, int]) -> list[_Part]:
    size, (per_input, per_output) = x.shape[dim], unit
    count = size // per_input
    last = max(count - tile, 0)
    starts = [*range(0, last, tile - overlap), last]
    stops = [min(start + tile, count) for start in starts]
    on_cpu: Any = dict(dtype=torch.float64, device="cpu")
    weights = torch.zeros(len(starts), count * per_output, **on_cpu)
    for weight, start, stop in zip(weights, starts, stops, strict=True):
        position = torch.arange((stop - start) * per_output, **on_cpu) + 0.5
        distance = torch.minimum(position, position.flip(0))
        weight[start * per_output : stop * per_output] = distance.clamp(
            max=max(overlap * per_output, 0.5)
        )
    shares = (weights / weights.sum(0)).to(x.device, torch.promote_types(x.dtype, torch.float32))
    parts = []
    for start, stop, share in zip(starts, stops, shares, strict=True):
        write = slice(start * per_output, stop * per_output)
        read = slice(start * per_input, size if stop == count else stop * per_input)
        parts.append(_Part(read, write, share[write]))
    return parts

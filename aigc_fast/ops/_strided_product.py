"""Strided convolutions with large kernels on small maps, as one product of matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops.linear import linear

#: elements of a weight from which the product is the faster one; half as many are a tie
LARGE = 1 << 20


def strided_product(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """conv2d(x, weight, None, stride, padding) for a square kernel of a multiple of the stride, by
    operations that copy no more than they must where both are channels_last, as the result is."""
    vertical, horizontal = padding
    n, channels, height, width = x.shape
    # Blocks of stride pixels: what lies beyond the last whole one is read by no output.
    rows, columns = (height + 2 * vertical) // stride, (width + 2 * horizontal) // stride
    bottom = rows * stride - height - vertical
    right = columns * stride - width - horizontal
    blocks = F.pad(x, (horizontal, right, vertical, bottom)).permute(0, 2, 3, 1)
    blocks = blocks.reshape(n, rows, stride, columns, stride * channels)
    count = weight.shape[2] // stride  # of blocks that an output meets in either direction
    rows, columns = rows - count + 1, columns - count + 1
    blocks = torch.cat([blocks[:, :, :, i : i + columns] for i in range(count)], 4)
    blocks = blocks.transpose(2, 3).flatten(3)
    blocks = torch.cat([blocks[:, i : i + rows] for i in range(count)], 3)
    product = linear(blocks.flatten(0, 2), weight.permute(0, 2, 3, 1).flatten(1))
    return product.view(n, rows, columns, len(weight)).permute(0, 3, 1, 2)

"""Strided convolutions with large kernels on small maps, as one product of matrices.

Where the weight outgrows a core's cache and there are few outputs, oneDNN's convolution takes
longer than its matrix product, most of all for the gradient of the weight. Forward and backward
of 32 maps of 256 x 8 x 8 to 512 channels, kernel 4, stride 2, on one core with AMX: 150 against
23 ms in bfloat16, and the convolution 1.2 to 1.5 times the product in float32, 1.1 times in
bfloat16 without AMX. What `ops.conv2d` has products of its own for is quicker still.
"""

import torch
from torch import Tensor, nn

from aigc_fast.ops._conv_bfloat16 import serves
from aigc_fast.ops._strided_product import LARGE
from aigc_fast.ops._winograd import CONV4X4, kind_of, pays


def is_better(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `strided_product` can take the place of the convolution, and is the faster one."""
    if x.device.type != "cpu" or x.dim() != 4 or torch.compiler.is_compiling():
        return False
    if x.shape[1] != conv.in_channels:
        return False  # the convolution says so
    (height, width), (step, step_x) = conv.kernel_size, conv.stride
    if height != width or step != step_x or step == 1 or height % step or conv.groups > 1:
        return False
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    rows, columns = ((n + 2 * p) // step for n, p in zip(x.shape[2:], conv.padding, strict=True))
    if min(rows, columns) < height // step or conv.weight.numel() < LARGE:
        return False
    kind = kind_of(conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)
    if kind is not None and pays(kind, x, conv.weight, None, transposed=False):
        return False  # fewer products still
    if kind is CONV4X4 and serves(x, conv.weight, None, transposed=False):
        return False  # the same product, and better ones of its derivatives
    last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, conv.weight))
    return last and 0 < x.shape[0] * rows * columns <= x.shape[1] * height * width

"""4x4 convolutions with stride 2 and a border of one zero in bfloat16, where the CPU multiplies
that (AVX-512): oneDNN's, with derivatives of their own.

torch makes the second derivative with respect to the weight of transposed images: 32 of them, 64 x
32 x 32 with 128 outputs, take 5.2 ms on two Zen 5 cores against 3.4 ms as the gradient of a weight,
which it is too, and 2.4 by a kernel of ours; of 3 x 64 x 64 with 64 outputs 2.5 against 0.4. And
where the weight outgrows a core's cache, 256 x 8 x 8 with 512 outputs, a product of matrices takes
2.5 ms against 3.6. Not with AMX, where it has not been measured.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import _libraries
from aigc_fast._devices import has_bfloat16_instructions, has_fast_bfloat16
from aigc_fast.ops._autograd import transforming, wanted
from aigc_fast.ops._checks import plain_on_cpu
from aigc_fast.ops._conv4x4 import conv4x4_backward_taps
from aigc_fast.ops._strided_product import LARGE, strided_product
from aigc_fast.ops._winograd import CONV4X4

_HOW = [2, 2], [1, 1], [1, 1], False, [0, 0], 1


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> bool:
    """Whether a derivative is wanted of a convolution, transposed or not, that is KIND's."""
    into, out = (0, 1) if transposed else (1, 0)
    tensors = [x, weight] if bias is None else [x, weight, bias]
    mixed = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if mixed else x.dtype
    return (
        dtype is torch.bfloat16
        and x.device.type == "cpu"
        and wanted(*tensors)
        and has_bfloat16_instructions()
        and not has_fast_bfloat16("cpu")
        and x.dim() == 4
        and x.numel() > 0 < weight.numel()
        and x.shape[1] == weight.shape[into]
        and (transposed or x.shape[2] % 2 == x.shape[3] % 2 == 0)
        and (bias is None or bias.shape == weight.shape[out : out + 1])
        and plain_on_cpu(tensors, (dtype, torch.float32) if mixed else (dtype,))
        and not transforming()
        and torch._C._get_mkldnn_enabled()
    )


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, channels, height, width = x.shape
    few = n * height * width <= 64 * channels  # outputs for each product of one
    if bias is None and few and weight.numel() >= LARGE:
        return strided_product(x, weight, 2, (1, 1))
    return F.conv2d(x, weight, bias, 2, 1)


def _transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, 2, 1)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    out, channels = grad.shape[1], x.shape[1]
    if _has_kernel() and out % 16 == channels % 16 == 0:
        return conv4x4_backward_taps(grad, x).permute(0, 3, 1, 2)
    weight = x.new_empty(out, 4, 4, channels).permute(0, 3, 1, 2)
    mask = False, True, False
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *_HOW, mask)[1]


@functools.cache
def _has_kernel() -> bool:
    """Whether the library that runs here has conv4x4_backward_taps."""
    library = _libraries.loaded.get("cpu")
    return library is not None and library.stem == "cpu_avx512" and has_bfloat16_instructions()


KIND = CONV4X4._replace(conv=_conv, transpose=_transpose, weight_gradient=_weight_gradient)

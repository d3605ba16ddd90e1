"""Convolutions along time with what vocoders have around them, fused, in training too.

On a GPU, whose convolutions are cuDNN's, under autocast, and on a CPU in 16 bits where its products
are the slower ones, they are chains of torch's operations.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast._devices import has_bfloat16_instructions, torch_multiplies


def convolve(
    x: Tensor,
    conv: nn.Module,
    slope: float = 1.0,
    residuals: Sequence[Tensor] = (),
    gain: float = 1.0,
    outputs: slice | None = None,
) -> Tensor:
    """gain * (conv(leaky_relu(x, slope))[:, outputs] + sum(residuals)): see `ops.conv1d`.

    x:         (batch, channels, time), of any strides.
    conv:      an nn.Conv1d.
    slope:     of the leaky ReLU before the convolution; 1 is none, 0 a ReLU.
    residuals: tensors of the shape of the result.
    """
    assert isinstance(conv, nn.Conv1d)
    weight, bias = conv.weight, conv.bias
    if outputs is not None:  # the gradient of a slice is a copy
        weight, bias = weight[outputs], None if bias is None else bias[outputs]
    places = conv.stride[0], int(conv.padding[0]), conv.dilation[0]
    if is_compiled(conv):
        while len(residuals) > 3:  # the operator adds three
            residuals = [*residuals[:-2], residuals[-2] + residuals[-1]]
        return ops.conv1d(x, weight, bias, residuals, *places, slope, gain)
    y = F.conv1d(_bent(x, slope), weight, bias, *places, groups=conv.groups)
    for residual in residuals:
        y = y + residual
    return y if gain == 1 else y * gain


def upsample(x: Tensor, conv: nn.Module, slope: float = 1.0) -> Tensor:
    """conv(leaky_relu(x, slope)), conv being an nn.ConvTranspose1d: see `ops.conv_transpose1d`.

    x and slope are as for `convolve`.
    """
    assert isinstance(conv, nn.ConvTranspose1d)
    if is_compiled(conv):
        stride, padding = conv.stride[0], int(conv.padding[0])
        places = conv.output_padding[0], conv.dilation[0]
        return ops.conv_transpose1d(x, conv.weight, conv.bias, stride, padding, slope, *places)
    return conv(_bent(x, slope))


def is_compiled(conv: nn.Conv1d | nn.ConvTranspose1d | nn.Conv2d) -> bool:
    """Whether a compiled operator computes it: on a CPU, if not slower than torch's."""
    if conv.groups > 1 or conv.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    dtype = conv.weight.dtype
    if dtype == torch.bfloat16:
        return has_bfloat16_instructions()
    return dtype != torch.float16 or not torch_multiplies(torch.float16)


def is_fused(conv: nn.Conv1d | nn.ConvTranspose1d | nn.Conv2d, *tensors: Tensor | None) -> bool:
    """The same of what has no derivative: where no gradient is wanted."""
    used = (*tensors, conv.weight, conv.bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in used)
    return not wanted and is_compiled(conv)


def _bent(x: Tensor, slope: float) -> Tensor:
    return x if slope == 1 else F.leaky_relu(x, slope)

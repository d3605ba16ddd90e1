"""Weights of convolutions kept as oneDNN packs them, for models whose weights stay the same.

torch packs a weight anew in each call, which for few pixels takes as long as the products.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aigc_fast._devices import has_bfloat16_instructions
from aigc_fast.ops._autograd import transforming, wanted
from aigc_fast.ops._winograd import are_faster, in_torch_order, kind_of
from aigc_fast.ops.upsample_conv2d import fold

#: Pixels of the result up to which packing is a part of the time that is worth a second copy of the
#: weight, and of float32 where the choice is between that and Winograd's fewer products.
_PIXELS, _PIXELS_OF_WINOGRAD = 1024, 64
#: Elements of a weight that are compared with those that were packed.
_SAMPLE = 64


class _Kept(NamedTuple):
    pointer: int
    version: int
    elements: Tensor  # a view of the weight
    copies: Tensor
    packed: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Whether weight is what was packed. Writing to its `data` changes no version: some of its
        elements are compared."""
        return (
            self.pointer == weight.data_ptr()
            and self.version == weight._version
            and self.packed.dtype is weight.dtype
            and torch.equal(self.elements, self.copies)
        )


class Packed:
    """A weight as `pack` makes it, made anew when the weight has changed. A copy is empty."""

    def __init__(self, pack: Callable[..., Tensor]) -> None:
        self._pack = pack
        self._kept: _Kept | None = None

    def __reduce__(self) -> Any:
        return Packed, (self._pack,)

    def forget(self) -> None:
        self._kept = None

    def of(self, weight: Tensor, *how: Any) -> Tensor:
        kept = self._kept
        if kept is None or not kept.is_of(weight):
            flat = weight.detach().as_strided((weight.numel(),), (1,))
            step = max(1, weight.numel() // _SAMPLE)
            while math.gcd(step, weight.numel()) > 1:  # else all were of one tap and few channels
                step -= 1
            elements = flat[::step]
            packed = self._pack(weight.detach(), *how)
            kept = _Kept(weight.data_ptr(), weight._version, elements, elements.clone(), packed)
            self._kept = kept
        return kept.packed


def pack_convolution(weight: Tensor, how: tuple, size: torch.Size) -> Tensor:
    """how: what torch.convolution takes behind the bias; size: of an input."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *how, list(size))


def pack_upsampling(weight: Tensor, how: tuple, size: torch.Size) -> Tensor:
    """That of the transposed convolution which `upsample_conv2d` is."""
    folded = fold(weight).contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(folded, *how, list(size))


def convolve(conv: Any, packed: Packed, x: Tensor) -> Tensor | None:
    """conv(x), an nn.Conv2d with zeros around x; None where its weight had better not be packed."""
    weight, bias, (down, across) = conv.weight, conv.bias, conv.stride
    how = conv.padding, conv.stride, conv.dilation, conv.groups
    kind = kind_of(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
    few_products = kind is not None and x.dtype is torch.float32 and are_faster()
    most = _PIXELS_OF_WINOGRAD if few_products else _PIXELS
    # It may have got another border since, as for textures that are to be tiled.
    if conv.padding_mode != "zeros" or not _fits(x, weight, bias):
        return None
    if x.numel() > most * down * across * x.shape[1]:
        return None
    kept = packed.of(weight, how, x.shape)
    y = torch.ops.mkldnn._convolution_pointwise(x, kept, bias, *how, "none", [], "")
    return in_torch_order(y, x, weight)


def upsample(conv: Any, packed: Packed, x: Tensor) -> Tensor | None:
    """conv(interpolate(x, scale_factor=2)) in the same way."""
    weight, bias = conv.weight, conv.bias
    if not _fits(x, weight, bias) or x.numel() > _PIXELS * x.shape[1]:
        return None
    padding = [size // 2 for size in conv.kernel_size]
    how = padding, [0, 0], [2, 2], [1, 1], 1
    kept = packed.of(weight, how, x.shape)
    y = torch.ops.mkldnn._convolution_transpose_pointwise(x, kept, bias, *how, "none", [], "")
    return in_torch_order(y, x, weight)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's operators take these, and nothing but their result is wanted."""
    has_products = x.dtype is torch.float32 or (
        x.dtype is torch.bfloat16 and has_bfloat16_instructions()
    )
    return (
        has_products
        and type(x) is Tensor
        and x.dim() == 4
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and all(
            type(t) is nn.Parameter  # what a parametrization computes is new each time
            and t.dtype is x.dtype
            and t.device.type == "cpu"
            and not t.is_inference()
            for t in (weight, weight if bias is None else bias)
        )
        and weight.shape[1] == x.shape[1]  # no groups
        and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
        and not wanted(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
        and torch._C._get_mkldnn_enabled()
        and torch._C._get_tracing_state() is None  # torch.jit cannot record oneDNN's operators
    )

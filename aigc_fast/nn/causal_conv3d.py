"""CausalConv3d."""

from typing import Any

from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops.causal_conv3d import Triple
from aigc_fast.ops.conv2d import Pair


class CausalConv3d(nn.Conv3d):
    """nn.Conv3d that looks at no later frame, by `ops.causal_conv3d`: weight, bias and state dict
    as there. `padding` is that of height and width; `forward` takes the frames before its input,
    the end of the last part of a stream.

    >>> conv = CausalConv3d(64, 64, 3, padding=1)
    >>> y = conv(first)
    >>> y = conv(second, first[:, :, -2:])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple,
        stride: Triple = 1,
        padding: Pair = 0,
        dilation: Triple = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        pair: Any = (padding, padding) if isinstance(padding, int) else tuple(padding)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, (0, *pair), dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, input: Tensor, history: Tensor | None = None) -> Tensor:
        how: Any = self.stride, self.padding[1:], self.dilation, self.groups, history
        return ops.causal_conv3d(input, self.weight, self.bias, *how)

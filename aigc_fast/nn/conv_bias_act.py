"""Convolutions whose bias and activation are one pass over what the convolution gives."""

from typing import Any

from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops._activations import resolve
from aigc_fast.ops._strided_product import strided_product

from ._strided_conv import is_better
from .bias_act import describe, of_dtype
from .conv2d import Conv2d


class _ConvBiasAct(nn.modules.conv._ConvNd):
    """The activation, and all it shares: the convolution is the class that comes next."""

    def __init__(
        self,
        *args: Any,
        act: str = "linear",
        alpha: float | None = None,
        gain: float | None = None,
        clamp: float | None = None,
        **conv: Any,
    ) -> None:
        super().__init__(*args, **conv)
        resolve(act, alpha, clamp)  # refuses what is none
        self.act, self.alpha, self.gain, self.clamp = act, alpha, gain, clamp

    def _activate(self, y: Tensor) -> Tensor:
        bias, dim = of_dtype(self.bias, y), y.dim() - 3  # of the channels, without a batch too
        return ops.bias_act(y, bias, dim, self.act, self.alpha, self.gain, self.clamp)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


class Conv2dBiasAct(_ConvBiasAct, Conv2d):
    """nn.Conv2d with the activation that follows it: arguments, weight and bias as there, any
    memory format.

    act, alpha, gain, clamp: as for `ops.bias_act`. The default gain of relu, lrelu and swish is
    sqrt(2); gain=1.0 gives the function of that name in torch.

    >>> Conv2dBiasAct(3, 64, 4, 2, 1, act="lrelu", alpha=0.2, gain=1.0)
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_better(self, input):
            y = strided_product(input, self.weight, self.stride[0], self.padding)  # type: ignore[arg-type]
        else:
            y = self._conv_forward(input, self.weight, None)
        return self._activate(y)


class ConvTranspose2dBiasAct(_ConvBiasAct, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with the activation that follows it, as `Conv2dBiasAct`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            raise ValueError("output_size must be None: give output_padding to the constructor")
        how: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return self._activate(ops.conv_transpose2d(input, self.weight, None, *how))

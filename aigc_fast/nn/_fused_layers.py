"""torch's layers and norms with the activation after them, and which of them `fuse` knows."""

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn.bias_act import of_dtype
from aigc_fast.nn.conv2d import convolve
from aigc_fast.nn.norm_act import Activated, BatchNormAct, SyncBatchNormAct
from aigc_fast.ops._activations import ACTIVATIONS, activate, resolve
from aigc_fast.ops._winograd import in_torch_order


class Fused(Activated):
    """Goes in front of a stock class, whose forward is super()'s, and applies act too."""

    #: the operator that it calls, for the report
    uses = "bias_act"
    #: the activations that it has
    acts: Collection[str] = ACTIVATIONS

    if TYPE_CHECKING:  # the attributes of the stock class

        def __getattr__(self, name: str) -> Any: ...

    def activated(self, y: Tensor) -> Tensor:
        """As plain PyTorch, which a compiler fuses by itself."""
        number, alpha, *_ = resolve(self.act, self.alpha)
        return activate(y, number, alpha)


class Biased(Fused):
    """A layer whose bias the activation's operator adds."""

    kernel_size: tuple[int, ...] = ()  # of a Linear: its channels are the last dimension

    def without_bias(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.activated(super().forward(input))
        y = self.without_bias(input)
        channels = -1 - len(self.kernel_size)
        return ops.bias_act(y, of_dtype(self.bias, y), channels, self.act, self.alpha, gain=1.0)


class Linear(Biased):
    def without_bias(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class Conv(Biased):
    def without_bias(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)


class Conv2d(Biased):
    def without_bias(self, x: Tensor) -> Tensor:
        weight = self.weight  # once: a parametrization computes it anew each time
        y = convolve(self, x, weight, None)  # type: ignore[arg-type]
        return in_torch_order(y, x, weight)


_CONV_TRANSPOSE: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    ops.conv_transpose2d,
    F.conv_transpose3d,
)


class ConvTranspose(Biased):
    def without_bias(self, x: Tensor) -> Tensor:
        weight = self.weight
        y = _CONV_TRANSPOSE[len(self.kernel_size) - 1](
            x, weight, None, self.stride, self.padding, self.output_padding, self.groups,
            self.dilation,
        )  # fmt: skip
        return in_torch_order(y, x, weight)


class BatchNorm(Fused, BatchNormAct):
    uses = "batch_norm_act"

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.activated(super(Activated, self).forward(input))  # torch's
        return super().forward(input)


class SyncBatchNorm(BatchNorm, SyncBatchNormAct):
    pass


class InstanceNorm(Fused):
    uses = "instance_norm_act"

    def forward(self, input: Tensor) -> Tensor:
        if _as_stock(input) or input.dim() == self._get_no_batch_dim():
            return self.activated(super().forward(input))
        self._check_input_dim(input)
        return ops.instance_norm_act(input, self.weight, self.bias, self.eps, self.act, self.alpha)


_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class GroupNorm(Fused):
    uses = "group_norm_act"
    acts = _SMOOTH

    def forward(self, input: Tensor) -> Tensor:
        if _as_stock(input):
            return _SMOOTH[self.act](super().forward(input))
        return ops.group_norm_act(
            input, self.num_groups, self.weight, self.bias, self.eps, self.act
        )


def _as_stock(x: Tensor) -> bool:
    """Whether a compiler fuses by itself, or autocast chooses the dtype of torch's norm."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


class Absorbed(nn.Module):
    """An activation that the layer before it has applied."""

    def forward(self, input: Tensor) -> Tensor:
        return input


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
LAYERS: dict[type, type[Fused]] = {
    nn.Linear: Linear,
    **dict.fromkeys(CONVS, Conv),
    nn.Conv2d: Conv2d,
    **dict.fromkeys(TRANSPOSED, ConvTranspose),
    **dict.fromkeys(BATCH_NORMS, BatchNorm),
    nn.SyncBatchNorm: SyncBatchNorm,
    **dict.fromkeys(_INSTANCE_NORMS, InstanceNorm),
    nn.GroupNorm: GroupNorm,
}
#: stock class -> (act, alpha) of one of its modules; no act where bias_act has none like it
STOCK_ACTIVATIONS: dict[type, Callable[[Any], tuple[str | None, float | None]]] = {
    nn.ReLU: lambda m: ("relu", None),
    nn.LeakyReLU: lambda m: ("lrelu", m.negative_slope),
    nn.Tanh: lambda m: ("tanh", None),
    nn.Sigmoid: lambda m: ("sigmoid", None),
    nn.ELU: lambda m: ("elu", m.alpha),
    nn.SELU: lambda m: ("selu", None),
    nn.Softplus: lambda m: ("softplus" if (m.beta, m.threshold) == (1, 20) else None, None),
    nn.SiLU: lambda m: ("swish", None),
    nn.GELU: lambda m: ("gelu" if m.approximate == "none" else "gelu_tanh", None),
}

"""What the networks share: norms with the leaky ReLU or ReLU that follows them, under the keys of
the norm."""

from typing import Any

from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import BatchNormAct2d, GroupNormAct, InstanceNormAct
from aigc_fast.nn.bias_act import of_dtype

#: the norms that a network of this folder takes; None for none
NORMS = ("batch", "instance", "layer", None)
#: options of bias_act that make it torch's function of the name
RELU: dict[str, Any] = {"act": "relu", "gain": 1.0}
LEAKY: dict[str, Any] = {"act": "lrelu", "alpha": 0.2, "gain": 1.0}


class LayerNormAct(GroupNormAct):
    """One norm over all of a sample; a gradient penalty of each sample allows it."""

    def __init__(self, channels: int, **act: Any) -> None:
        super().__init__(1, channels)
        self.options = act

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = of_dtype(self.weight, x), of_dtype(self.bias, x)
        y = ops.group_norm_act(x, self.num_groups, weight, bias, self.eps)
        return ops.bias_act(y, None, 1, **self.options)


def norm_act(norm: str | None, channels: int, **act: Any) -> nn.Module:
    """The norm of that name over (batch, channels, height, width), then the activation.

    "layer" is over all of a sample and has its weight and bias a channel, "instance" over each
    channel of a sample.
    """
    if norm == "batch":
        return BatchNormAct2d(channels, **act)
    if norm == "instance":
        return InstanceNormAct(channels, affine=True, **act)
    return LayerNormAct(channels, **act)

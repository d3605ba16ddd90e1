"""Group norm and the activation after it."""

from typing import Any

from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn.bias_act import of_dtype


class GroupNormAct(nn.GroupNorm):
    """nn.GroupNorm with the activation that follows it, in one operator: weight, bias as there.

    activation: "none", "silu", "gelu" or "gelu_tanh", as for `ops.group_norm_act`.

    >>> GroupNormAct(32, 128, activation="silu")  # nn.GroupNorm(32, 128), then nn.SiLU()
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *args: Any,
        activation: str = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, *args, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = of_dtype(self.weight, x), of_dtype(self.bias, x)
        return ops.group_norm_act(x, self.num_groups, weight, bias, self.eps, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"

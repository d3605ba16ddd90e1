"""A linear layer whose weight is kept as 4- or 8-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aigc_fast import ops


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias, W the weight that the codes stand for; see `ops.quantized_linear`.

    For inference: there is no derivative.

    Attributes:
        weight: uint8 (ceil(out_features / 16), groups, bytes), from `ops.quantize_weight` or
            `ops.pack_weight`.
        bias: (out_features,), or None.
        quantize_activations: round x to int8 too.

    >>> layer = QuantizedLinear.from_linear(nn.Linear(64, 32), bits=4, group_size=32)
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        quantize_activations: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        self.quantize_activations = quantize_activations
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int,
        group_size: int,
        *,
        symmetric: bool = True,
        quantize_activations: bool = False,
    ) -> QuantizedLinear:
        """Rounds the weight of a linear layer to the nearest codes; see `ops.quantize_weight`."""
        weight = ops.quantize_weight(linear.weight.detach(), bits, group_size, symmetric=symmetric)
        return cls(
            weight,
            None if linear.bias is None else linear.bias.detach(),
            linear.in_features,
            linear.out_features,
            bits=bits,
            group_size=group_size,
            quantize_activations=quantize_activations,
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantized_linear(
            x,
            self.weight,
            self.bias,
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            quantize_activations=self.quantize_activations,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features) as numbers."""
        return ops.dequantize_weight(
            self.weight, self.bits, self.group_size, self.out_features, self.in_features, dtype
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"quantize_activations={self.quantize_activations}"
        )

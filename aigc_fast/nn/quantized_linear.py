"""A linear layer whose weight is kept as 4- or 8-bit codes."""

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast._devices import has_fast_bfloat16
from aigc_fast.ops._checks import check_positive
from aigc_fast.ops._quantized_format import check_bits, check_group_size, check_in_features

from .bias_act import of_dtype


class QuantizedLinear(nn.Module):
    """nn.Linear with a packed weight, for inference: `ops.quantized_linear` has the formats.

    weight: buffer, uint8 (ceil(out_features / 16), groups, bytes); zeros, codes to be loaded.
    bias:   buffer (out_features,) or None.
    bits, group_size: as for `ops.quantized_linear`; a group_size of None is all of in_features.
    quantize_activations: round x to int8, group by group, as `ops.quantized_linear` does; on a CPU
            with AMX 64 rows and more of float32 are rounded to bfloat16 instead, and their results
            too: that is closer, and its matrix unit is faster still.
    symmetric: False if the weight has a minimum for each group.

    >>> QuantizedLinear.from_linear(nn.Linear(576, 1536), bits=4, group_size=32, symmetric=False)
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int,
        group_size: int | None,
        symmetric: bool = True,
        quantize_activations: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bits(bits)
        run = 32 // bits
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        check_positive(in_features=in_features, out_features=out_features)
        self.group_size = -(-in_features // run) * run if group_size is None else group_size
        check_group_size(self.group_size, bits)
        self.quantize_activations = quantize_activations
        groups = -(-in_features // self.group_size)
        size = 16 * (self.group_size * bits // 8 + (2 if symmetric else 4))
        tiles = -(-out_features // 16)
        weight = torch.zeros(tiles, groups, size, dtype=torch.uint8, device=device)
        whole = f"in_features must be that of whole groups of {self.group_size}"
        check_in_features(whole, in_features, weight, bits, self.group_size)
        self.register_buffer("weight", weight)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", zeros)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int,
        group_size: int | None,
        symmetric: bool = True,
        quantize_activations: bool = False,
    ) -> "QuantizedLinear":
        """The layer with the nearest codes to the weight of `linear`, on its device."""
        weight = ops.quantize_weight(linear.weight.detach(), bits, group_size, symmetric=symmetric)
        module = cls.from_packed(linear, weight, bits, group_size, quantize_activations)
        if linear.bias is not None:
            module.bias = linear.bias.detach().clone()
        return module.train(linear.training)

    @classmethod
    def from_packed(
        cls,
        linear: nn.Linear,
        weight: Tensor,
        bits: int,
        group_size: int | None,
        quantize_activations: bool = False,
    ) -> "QuantizedLinear":
        """The layer of the sizes of `linear` with that packed weight; its bias is on meta."""
        module = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=bits,
            group_size=group_size,
            quantize_activations=quantize_activations,
            device="meta",
        )
        module.weight = weight
        return module

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias, self.out_features)

    def part(self, x: Tensor, index: int, parts: int) -> Tensor:
        """The outputs from index * n on, n = out_features / parts, a multiple of 16: those of one
        expert of many."""
        tiles, rows = len(self.weight) // parts, self.out_features // parts
        weight = self.weight[index * tiles : (index + 1) * tiles]
        bias = None if self.bias is None else self.bias[index * rows : (index + 1) * rows]
        return self._linear(x, weight, bias, rows)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        if self._multiplies_in_bfloat16(x):
            y = self._product(x.bfloat16(), weight, None, rows, False).float()
            return y if bias is None else y.add_(bias)
        return self._product(x, weight, of_dtype(bias, x), rows, self.quantize_activations)

    def _multiplies_in_bfloat16(self, x: Tensor) -> bool:
        return (
            self.quantize_activations
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.numel() >= 64 * self.in_features
            and has_fast_bfloat16(x.device)
        )

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, quantize_activations: bool
    ) -> Tensor:
        return ops.quantized_linear(
            x,
            weight,
            bias,
            bits=self.bits,
            group_size=self.group_size,
            out_features=rows,
            in_features=self.in_features,
            quantize_activations=quantize_activations,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"quantize_activations={self.quantize_activations}"
        )

"""Layer norm, and the norms of adaLN that a condition scales and shifts."""

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn.rms_norm import RMSNorm


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension: weight, bias as there."""

    def __init__(self, hidden_size: int, *args: object, **kwargs: object) -> None:
        super().__init__(hidden_size, *args, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class ModulatedLayerNorm(LayerNorm):
    """LayerNorm(x) * (1 + scale) + shift, scale and shift as for `ops.modulated_layer_norm`.

    >>> ModulatedLayerNorm(1152, eps=1e-6, elementwise_affine=False)  # of a DiT block
    """

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return ops.modulated_layer_norm(x, scale, shift, self.weight, self.bias, self.eps)


class ModulatedRMSNorm(RMSNorm):
    """RMSNorm(x) * (1 + scale) + shift, scale and shift as for `ops.modulated_rms_norm`."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.modulated_rms_norm(x, scale, shift, self.weight, eps)

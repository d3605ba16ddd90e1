"""Layer norm, and the norms of adaLN that a condition scales and shifts."""

from collections.abc import Sequence

from torch import Tensor, nn

from aigc_fast import ops

from .bias_act import of_dtype
from .rms_norm import RMSNorm, check_hidden_size


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension: weight, bias as there.

    hidden_size: the size of that dimension, alone or as torch's shape of one number.
    """

    def __init__(self, hidden_size: int | Sequence[int], *args: object, **kwargs: object) -> None:
        super().__init__(hidden_size, *args, **kwargs)  # type: ignore[arg-type]
        check_hidden_size(self.normalized_shape)

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(
            input, of_dtype(self.weight, input), of_dtype(self.bias, input), self.eps
        )


class ModulatedLayerNorm(LayerNorm):
    """LayerNorm(x) * (1 + scale) + shift, scale and shift as for `ops.modulated_layer_norm`.

    >>> ModulatedLayerNorm(1152, eps=1e-6, elementwise_affine=False)  # of a DiT block
    """

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        weight, bias = of_dtype(self.weight, input), of_dtype(self.bias, input)
        return ops.modulated_layer_norm(input, scale, shift, weight, bias, self.eps)


class ModulatedRMSNorm(RMSNorm):
    """RMSNorm(x) * (1 + scale) + shift, scale and shift as for `ops.modulated_rms_norm`."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return ops.modulated_rms_norm(x, scale, shift, of_dtype(self.weight, x), self.eps_for(x))

"""Gates of gated MLPs."""

from torch import Tensor, nn

from aigc_fast import ops


class SwiGLU(nn.Module):
    """silu(gate) * up."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up)

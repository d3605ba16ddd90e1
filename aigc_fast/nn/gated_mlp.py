"""Gates of gated MLPs."""

from torch import Tensor, nn

from aigc_fast import ops


class SwiGLU(nn.Module):
    """silu(gate) * up, both (..., width), as `ops.swiglu`."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up)


class GEGLU(nn.Module):
    """gelu(gate) * up, both (..., width), as `ops.geglu`; `approximate` as in nn.GELU."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.geglu(gate, up, approximate=self.approximate)

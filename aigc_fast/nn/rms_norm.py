"""Root-mean-square norm."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aigc_fast import ops

from .bias_act import of_dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    hidden_size: the size of that dimension, alone or as torch's shape of one number.
    eps: as in torch.nn.RMSNorm: None is the machine epsilon of float32, of float64 for float64.
    """

    def __init__(
        self,
        hidden_size: int | Sequence[int],
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        check_hidden_size(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, of_dtype(self.weight, x), self.eps_for(x))

    def eps_for(self, x: Tensor) -> float:
        return eps_or_default(self.eps, x)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def eps_or_default(eps: float | None, x: Tensor) -> float:
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps


def check_hidden_size(shape: Sequence[int]) -> None:
    if len(shape) != 1:
        raise ValueError(
            f"hidden_size must be one number, that of the last dimension, got {tuple(shape)}"
        )

"""Root-mean-square norm."""

import torch
from torch import Tensor, nn

from aigc_fast import ops


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of size hidden_size.

    eps: as in torch.nn.RMSNorm, None is the machine epsilon of x's dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

"""Snake and its anti-aliased form; parameters named and initialised as in BigVGAN."""

from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops.alias_free_snake import default_filters

from .bias_act import of_dtype


class Snake(nn.Module):
    """x + sin(alpha x)^2 / (alpha + 1e-9), one alpha per channel.

    channels:        the size of dimension 1 of x.
    alpha:           the initial frequency. Without effect where alpha_logscale is True, as in
                     BigVGAN's code: the frequency then starts at 1.
    alpha_trainable: False keeps the parameters from being trained.
    alpha_logscale:  True if the parameters are logarithms, as in the published BigVGAN models.

    >>> Snake(256)(torch.randn(2, 256, 100)).shape
    torch.Size([2, 256, 100])
    """

    beta: Tensor | None

    def __init__(
        self,
        channels: int,
        alpha: float = 1.0,
        alpha_trainable: bool = True,
        alpha_logscale: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.alpha_logscale = channels, alpha_logscale
        start = torch.full((channels,), 0.0 if alpha_logscale else float(alpha), dtype=dtype)
        self.alpha = nn.Parameter(start.to(device), requires_grad=alpha_trainable)
        self.register_parameter("beta", None)

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = of_dtype(self.alpha, x), of_dtype(self.beta, x)
        return ops.snake(x, alpha, beta, log_scale=self.alpha_logscale)

    def extra_repr(self) -> str:
        return f"{self.channels}, alpha_logscale={self.alpha_logscale}"


class SnakeBeta(Snake):
    """x + sin(alpha x)^2 / (beta + 1e-9): the amplitude has a parameter of its own.

    The arguments are those of `Snake`; beta starts where alpha does.
    """

    def __init__(self, channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(channels, *args, **kwargs)
        self.beta = nn.Parameter(self.alpha.detach().clone(), self.alpha.requires_grad)


class AliasFreeSnake(SnakeBeta):
    """SnakeBeta between BigVGAN's filters: its Activation1d(SnakeBeta(channels)) in one pass.

    x is (batch, channels, time). The arguments are those of `Snake`, and `tied`: one parameter for
    alpha and beta, as Activation1d(Snake(channels)) has. Activation1d's state dict names them
    act.alpha and act.beta, and has the filters, which here are constants.
    """

    up_filter: Tensor
    down_filter: Tensor

    def __init__(self, channels: int, *args: Any, tied: bool = False, **kwargs: Any) -> None:
        super().__init__(channels, *args, **kwargs)
        if tied:
            self.beta = None
        up, down = default_filters(self.alpha.device)
        self.register_buffer("up_filter", up.clone(), persistent=False)
        self.register_buffer("down_filter", down.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.alias_free_snake(
            x, of_dtype(self.alpha, x), of_dtype(self.beta, x), self.up_filter, self.down_filter,
            log_scale=self.alpha_logscale,
        )  # fmt: skip

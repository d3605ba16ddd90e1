"""torch's batch normalisation modules with the activation in the same operator."""

from typing import Any

from torch import Tensor, nn

from aigc_fast import ops


class _BatchNormAct(nn.modules.batchnorm._BatchNorm):
    """Parameters, buffers and their updates are those of torch's module."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: str = "linear",
        *,
        alpha: float | None = None,
        gain: float = 1.0,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self.act, self.alpha, self.gain = act, alpha, gain

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        training = self.training or self.running_mean is None
        track = not self.training or self.track_running_stats
        return ops.batch_norm_act(
            x,
            self.running_mean if track else None,
            self.running_var if track else None,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            self.act,
            self.alpha,
            self.gain,
        )

    def extra_repr(self) -> str:
        alpha = "" if self.alpha is None else f", alpha={self.alpha}"
        gain = "" if self.gain == 1 else f", gain={self.gain}"
        return f"{super().extra_repr()}, act={self.act}{alpha}{gain}"


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """nn.BatchNorm1d, then an activation: x of shape (N, C) or (N, C, L).

    act, alpha, gain: as for `ops.batch_norm_act`; the others, and the state dict, as for torch's.

    >>> BatchNormAct1d(512, eps=0.8, act="lrelu", alpha=0.2)
    """


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """nn.BatchNorm2d, then an activation: x of shape (N, C, H, W).

    act, alpha, gain: as for `ops.batch_norm_act`; the others, and the state dict, as for torch's.

    >>> BatchNormAct2d(128, act="relu")  # nn.BatchNorm2d(128), then nn.ReLU()
    """

"""torch's batch and instance norm with the activation in the same operator, and GANs' own norms."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops._activations import resolve
from aigc_fast.ops._checks import check_positive
from aigc_fast.ops._layout import wide


class Activated(nn.Module):
    """What is after the norm: gain * act(.)."""

    act = "linear"
    alpha: float | None = None
    gain = 1.0

    def set_act(self, act: str, alpha: float | None, gain: float) -> None:
        resolve(act, alpha)  # refuses what is none
        self.act, self.alpha, self.gain = act, alpha, gain

    def extra_repr(self) -> str:
        alpha = "" if self.alpha is None else f", alpha={self.alpha}"
        gain = "" if self.gain == 1 else f", gain={self.gain}"
        return f"{super().extra_repr()}, act={self.act}{alpha}{gain}".removeprefix(", ")


class BatchNormAct(Activated, nn.modules.batchnorm._BatchNorm):
    """Base of the batch norms: parameters, buffers and their updates are those of torch."""

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
        self.set_act(act, alpha, gain)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        training = self.training or self.running_mean is None
        track = not self.training or self.track_running_stats
        return ops.batch_norm_act(
            input,
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
            self._processes() if self.training else None,
        )

    def _processes(self) -> Any:
        """The process group whose x are one batch; None for this process alone."""
        return None


class BatchNormAct1d(BatchNormAct, nn.BatchNorm1d):
    """nn.BatchNorm1d, then an activation: x of shape (N, C) or (N, C, L).

    act, alpha, gain: as for `ops.batch_norm_act`; the others, and the state dict, as for torch's.

    >>> BatchNormAct1d(512, eps=0.8, act="lrelu", alpha=0.2)
    """


class BatchNormAct2d(BatchNormAct, nn.BatchNorm2d):
    """nn.BatchNorm2d, then an activation: x of shape (N, C, H, W). The rest as BatchNormAct1d.

    >>> BatchNormAct2d(128, act="relu")  # nn.BatchNorm2d(128), then nn.ReLU()
    """


class BatchNormAct3d(BatchNormAct, nn.BatchNorm3d):
    """nn.BatchNorm3d, then an activation: x of shape (N, C, D, H, W)."""


_BATCH_NORMS = (
    BatchNormAct1d, BatchNormAct2d, BatchNormAct3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip


class SyncBatchNormAct(BatchNormAct, nn.SyncBatchNorm):
    """nn.SyncBatchNorm, then an activation: x of shape (N, C, ...), on CPUs too.

    In training its statistics, and gradients of any order, are those of the batches of all
    processes together, which may differ in size; all of them must call it together. In evaluation,
    and where torch.distributed is not initialised, it is a batch norm.

    process_group: the processes; all of them where None.
    act, alpha, gain: as for `ops.batch_norm_act`; the others, and the state dict, as for torch's.

    >>> SyncBatchNormAct(128, act="relu")  # nn.SyncBatchNorm(128), then nn.ReLU()
    """

    def __init__(
        self, num_features: int, *args: Any, process_group: Any = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.process_group = process_group

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Turns the batch norms inside `module`, torch's and this library's, into this class, in
        place, and returns `module`. (torch.nn.SyncBatchNorm's method of this name would leave out
        the activations.)
        """
        for child in module.modules():
            if type(child) in _BATCH_NORMS:
                child.__class__ = cls
                child.process_group = process_group
        return module

    def _processes(self) -> Any:
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


class InstanceNormAct(Activated):
    """nn.InstanceNorm1d, 2d or 3d, then an activation: x of shape (N, C, ...), never without N.

    affine: a weight and a bias of shape (num_features,), in the state dict as torch's; as there,
            without them by default.
    act, alpha, gain: as for `ops.instance_norm_act`. There are no running statistics.

    >>> InstanceNormAct(128, affine=True, act="lrelu")
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        affine: bool = False,
        act: str = "linear",
        alpha: float | None = None,
        gain: float = 1.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.set_act(act, alpha, gain)
        self.weight = nn.Parameter(torch.ones(num_features, **factory)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **factory)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.instance_norm_act(
            x, self.weight, self.bias, self.eps, self.act, self.alpha, self.gain
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, {super().extra_repr()}"


class AdaptiveInstanceNorm(Activated):
    """Instance norm, scaled and shifted by a style of shape (N, style_dim), then an activation.

    Its one child, `fc`, is nn.Linear(style_dim, 2 * num_features): scale, then shift, in
    act(instance_norm(x) * (1 + scale) + shift).

    >>> AdaptiveInstanceNorm(64, 256, act="lrelu")(images, styles)
    """

    def __init__(
        self,
        style_dim: int,
        num_features: int,
        eps: float = 1e-5,
        act: str = "linear",
        *,
        alpha: float | None = None,
        gain: float = 1.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.set_act(act, alpha, gain)
        self.fc = nn.Linear(style_dim, 2 * num_features, **factory)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.fc(style).chunk(2, 1)
        return ops.adaptive_instance_norm(
            x, scale, shift, self.eps, self.act, self.alpha, self.gain
        )


class PixelNormAct(Activated):
    """x / sqrt(mean(x^2) + eps) over the channels, then an activation, as `ops.pixel_norm_act`.

    >>> PixelNormAct()  # of a latent vector, before a mapping network
    """

    def __init__(
        self,
        eps: float = 1e-8,
        act: str = "linear",
        *,
        alpha: float | None = None,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.set_act(act, alpha, gain)

    def forward(self, x: Tensor) -> Tensor:
        return ops.pixel_norm_act(x, self.eps, self.act, self.alpha, self.gain)


class MinibatchStddev(nn.Module):
    """Appends to x, (N, C, ...), channels with the standard deviation over the samples of a group.

    group_size:   most samples of a group: the largest number up to it that divides the batch is
                  taken. None for the whole batch.
    num_channels: channels to append, each from C / num_channels of x.

    Plain PyTorch: it is one pass over the smallest map of a discriminator.

    Source: Karras et al. 2018, arXiv:1710.10196; num_channels as in arXiv:1912.04958.
    """

    def __init__(self, group_size: int | None = 4, num_channels: int = 1) -> None:
        super().__init__()
        check_positive(group_size=1 if group_size is None else group_size)
        check_positive(num_channels=num_channels)
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        if channels % self.num_channels:
            raise ValueError(
                f"num_channels ({self.num_channels}) must divide the channels of x, got shape "
                f"{tuple(x.shape)}"
            )
        most = batch if self.group_size is None else min(self.group_size, batch)
        group = next(size for size in range(max(most, 1), 0, -1) if batch % size == 0)
        each = channels // self.num_channels
        # (samples of a group, groups, channels to append, channels of each, ...)
        y = x.reshape(group, batch // group, self.num_channels, each, *x.shape[2:])
        deviation = (wide(y).var(0, correction=0) + 1e-8).sqrt()
        mean = deviation.flatten(2).mean(2).to(x.dtype)
        extra = mean.repeat(group, 1)[(...,) + (None,) * (x.dim() - 2)]
        return torch.cat([x, extra.expand(-1, -1, *x.shape[2:])], 1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_channels={self.num_channels}"

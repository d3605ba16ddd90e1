"""What batch norms keep, guarded as weights are."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics(*networks: nn.Module) -> Callable[[], None]:
    """Notes the running statistics of all batch norms. What it returns gives those that are not
    finite by then the values noted: they would stay so for ever after one bad batch, whose step the
    optimizer leaves out. Waits for no device."""
    norms = [m for net in networks for m in net.modules() if isinstance(m, _BatchNorm)]
    buffers = [buffer for m in norms for buffer in (m.running_mean, m.running_var)]
    noted = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]

    @torch.no_grad()
    def restore() -> None:
        for running, before in noted:
            running.copy_(torch.where(running.isfinite(), running, before))

    return restore

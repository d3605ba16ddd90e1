"""What batch norms keep, guarded as weights are."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class FiniteStatistics:
    """Keeps the running statistics of the batch norms in some networks finite: what is not would
    stay so for ever, after a single bad batch whose step the optimizer leaves out."""

    def __init__(self, *networks: nn.Module) -> None:
        norms = [m for net in networks for m in net.modules() if isinstance(m, _BatchNorm)]
        running = [buffer for m in norms for buffer in (m.running_mean, m.running_var)]
        self._running = [buffer for buffer in running if buffer is not None]
        self._finite = [buffer.clone() for buffer in self._running]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives what is not finite the value it had before. Waits for no device."""
        for running, finite in zip(self._running, self._finite, strict=True):
            finite.copy_(torch.where(running.isfinite(), running, finite))
            running.copy_(finite)

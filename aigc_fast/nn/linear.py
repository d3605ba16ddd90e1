"""Linear."""

from torch import Tensor, nn

from aigc_fast import ops


class Linear(nn.Linear):
    """nn.Linear by `ops.linear`: weight, bias and state dict as there.

    >>> Linear(784, 1024)
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)

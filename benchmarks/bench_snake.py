"""snake, alone and between its filters: forward, and forward with backward."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.ops.alias_free_snake import default_filters
from tests.op_samples import OPS


def snake(x, alpha, beta):
    """As BigVGAN's SnakeBeta writes it."""
    alpha, beta = alpha[None, :, None], beta[None, :, None]
    return x + (1.0 / (beta + 1e-9)) * torch.pow(torch.sin(x * alpha), 2)


def alias_free_snake(x, alpha, beta):
    """As BigVGAN's Activation1d writes it: pad, transposed convolution, snake, pad, convolution."""
    channels = x.shape[1]
    taps = default_filters(x.device)[0].to(x.dtype).expand(channels, 1, -1)
    x = F.pad(x, (5, 5), mode="replicate")
    x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=channels)[..., 15:-15]
    x = F.pad(snake(x, alpha, beta), (5, 6), mode="replicate")
    return F.conv1d(x, taps, stride=2, groups=channels)


EAGER = {"snake": snake, "alias_free_snake": alias_free_snake}


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EAGER)
def bench_snake(measure, name, dtype, direction) -> None:
    op = OPS[name]
    (sample,) = op.large()
    measure(op, sample, dtype, eager=EAGER[name], backward=direction != "forward")

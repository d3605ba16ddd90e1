"""What generators of waveforms are made of: upsamplings, residual blocks after each of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: bytes of an activation that a CPU computes at a time
PART = 1 << 21
#: a residual block: (x, residuals, gain) -> gain * (block(x) + sum(residuals))
Block = Callable[..., Tensor]


def residual_pairs(
    convolve: Callable[..., Tensor],
    x: Tensor,
    convs1: Iterable[Any],
    convs2: Iterable[Any],
    residuals: Sequence[Tensor] = (),
    gain: float = 1.0,
) -> Tensor:
    """The `Block` that adds a pair of convolutions to x, pair after pair.

    convolve: (x, conv, number of the convolution, residuals, gain) -> gain * (conv(act(x)) +
              sum(residuals)).
    """
    pairs = list(zip(convs1, convs2, strict=True))
    for i, (first, second) in enumerate(pairs):
        y = convolve(x, first, 2 * i)
        x = convolve(y, second, 2 * i + 1, *with_input(x, i == len(pairs) - 1, residuals, gain))
    return x


def with_input(
    x: Tensor, last: bool, residuals: Sequence[Tensor], gain: float
) -> tuple[Sequence[Tensor], float]:
    """What is added to a convolution of a block, and its gain: others' only to the last."""
    return ((x, *residuals), gain) if last else ((x,), 1.0)


def mean(blocks: Sequence[Block], x: Tensor) -> Tensor:
    """The mean of what the blocks make of x; the last of them adds the others up."""
    *others, last = blocks
    return last(x, [block(x) for block in others], 1 / len(blocks))


def in_parts(
    stage: Callable[[Tensor], Tensor], x: Tensor, up: nn.ConvTranspose1d, reach: int
) -> Tensor:
    """stage(x), from parts of x so small that what lies between stays in the caches.

    stage: `up` and what follows it.
    reach: steps to either side, after `up`, that a step of the result can depend on.

    Parts overlap by as much, so that it is the same to the bit.
    """
    (rate,), (kernel,) = up.stride, up.kernel_size
    overlap = -(-reach // rate) + -(-kernel // rate)
    size = max(4 * overlap, PART // (up.out_channels * rate * x.element_size()))
    parts = []
    for start in range(0, x.shape[2], size):
        first = max(0, start - overlap)
        y = stage(x[..., first : start + size + overlap])[..., (start - first) * rate :]
        if start + size < x.shape[2]:  # the last part may have more or fewer steps
            y = y[..., : size * rate]
        parts.append(y.transpose(1, 2))
    # Of sequences whose channels are innermost, torch joins rows without reordering them.
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)

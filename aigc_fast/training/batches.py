"""Mini-batches of tensors."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor


def batches(
    *tensors: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch: the rows of the tensors in a new order, `batch_size` at a time.

    generator: draws the order, on its own device. The rows that do not fill a batch are left out.
    """
    rows = len(tensors[0])
    if any(len(tensor) != rows for tensor in tensors):
        raise ValueError(f"tensors must be of one length, got {[len(t) for t in tensors]}")
    steps_of_epoch(rows, batch_size)
    order = torch.randperm(rows, generator=generator, device=generator.device)
    order = order.to(tensors[0].device)
    for start in range(0, rows - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield tuple(tensor[chosen] for tensor in tensors)


def as_floats(samples: Tensor) -> Tensor:
    """uint8 pixels as numbers in [-1, 1]; other samples as they are."""
    return samples.float().div_(127.5).sub_(1) if samples.dtype == torch.uint8 else samples


def steps_of_epoch(rows: int, batch_size: int) -> int:
    """The batches of so many rows; ValueError where there is none."""
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size must be 1 to {rows}, the rows there are, got {batch_size}")
    return rows // batch_size


def epochs_of_batches(
    *tensors: Tensor, batch_size: int, epochs: int, seed: int, done: int = 0
) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
    """(epoch, step of the epoch, batch), both counted from 1, after the first `done` steps. The
    order of the rows is a function of the seed and the epoch: it is the same wherever one begins.
    """
    first, begun = divmod(done, steps_of_epoch(len(tensors[0]), batch_size))
    for epoch in range(first, epochs):
        order = torch.Generator().manual_seed(((seed + 1 << 32) + epoch) % 2**64)
        rows = batches(*tensors, batch_size=batch_size, generator=order)
        yield from (
            (epoch + 1, step, batch)
            for step, batch in enumerate(islice(rows, begun, None), start=begun + 1)
        )
        begun = 0

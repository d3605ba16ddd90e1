"""The classes of the samples that are drawn."""

import torch
from torch import Tensor


def labels_of(
    count: int, label: int | None, num_classes: int | None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """That class, or all in turn, int64 (count,); None for a model without classes. ValueError for
    a class that it has not."""
    if label is not None and label >= (num_classes or 0):
        raise ValueError(
            f"label must be a class of the model, which has {num_classes or 'none'}, got {label}"
        )
    if not num_classes:
        return None
    if label is None:
        return torch.arange(count, device=device) % num_classes
    return torch.full((count,), label, device=device)

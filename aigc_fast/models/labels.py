"""Classes as an input of networks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_labels(labels: Tensor | None, conditional: bool) -> None:
    """ValueError unless there are labels just where the network is conditional."""
    if (labels is not None) != conditional:
        raise ValueError("labels must be given if, and only if, the network has num_classes")


def join_labels(x: Tensor, labels: Tensor | None, num_classes: int | None) -> Tensor:
    """x (batch, features) with one number a class behind it, or as it is without classes."""
    check_labels(labels, num_classes is not None)
    if labels is None or num_classes is None:
        return x
    return torch.cat([x, F.one_hot(labels, num_classes).to(x.dtype)], 1)

"""The activations of bias_act and their derivatives, in plain PyTorch."""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Row = TypeVar("Row")

DEFAULT_ALPHA = 0.2
#: names of one activation, of which every function takes either
_SYNONYMS = (("linear", "none"), ("lrelu", "leaky_relu"), ("swish", "silu"))
#: activation: (number in the schema, alpha, default gain, sign of y tells the slope)
ACTIVATIONS = {
    "linear": (0, DEFAULT_ALPHA, 1.0, True),
    "relu": (1, 0.0, math.sqrt(2), True),
    "lrelu": (2, DEFAULT_ALPHA, math.sqrt(2), True),
    "tanh": (3, DEFAULT_ALPHA, 1.0, False),
    "sigmoid": (4, DEFAULT_ALPHA, 1.0, False),
    "elu": (5, 1.0, 1.0, False),
    "selu": (6, DEFAULT_ALPHA, 1.0, False),
    "softplus": (7, DEFAULT_ALPHA, 1.0, False),
    "swish": (8, DEFAULT_ALPHA, math.sqrt(2), False),
}


def with_synonyms(table: dict[str, Row]) -> dict[str, Row]:
    """A table of activations with the rows of their other names."""
    both = {*_SYNONYMS, *((b, a) for a, b in _SYNONYMS)}
    return table | {b: table[a] for a, b in both if a in table}


_BY_NAME = with_synonyms(ACTIVATIONS)
#: the numbers of those that take an alpha
_TAKE_ALPHA = (ACTIVATIONS["lrelu"][0], ACTIVATIONS["elu"][0])

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


def check_clamp(clamp: float | None) -> None:
    """ValueError for a limit that is negative or NaN."""
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp must be at least 0 or None, got {clamp}")


def resolve(
    act: str, alpha: float | None, clamp: float | None = None
) -> tuple[int, float, float, bool]:
    """Its row in ACTIVATIONS, with this alpha if given; ValueError for what is no activation and
    for a clamp that is none."""
    check_clamp(clamp)
    row = _BY_NAME.get(act)
    if row is None:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if alpha is None:
        return row
    if row[0] not in _TAKE_ALPHA:
        raise ValueError(f"alpha must be None for act={act!r}, got {alpha}")
    return row[0], alpha, row[2], row[3]


def activate(x: Tensor, act: int, alpha: float) -> Tensor:
    """act(x), by its number in ACTIVATIONS."""
    match list(ACTIVATIONS)[act]:
        case "linear":
            return x.clone()
        case "relu":
            return F.relu(x)
        case "lrelu":
            return F.leaky_relu(x, alpha)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "elu":
            return F.elu(x, alpha)
        case "selu":
            return F.selu(x)
        case "softplus":
            return F.softplus(x)
        case _:
            return F.silu(x)


def slope(x: Tensor, act: int, alpha: float) -> Tensor:
    """d act / dx"""
    match list(ACTIVATIONS)[act]:
        case "linear":
            return torch.ones_like(x)
        case "relu" | "lrelu":
            # Two Python numbers would make float32, and 0.2 not that of float64.
            return torch.where(x > 0, torch.ones_like(x), alpha)
        case "tanh":
            return 1 - torch.tanh(x) ** 2
        case "sigmoid":
            return torch.sigmoid(x) * torch.sigmoid(-x)
        case "elu":
            return torch.where(x > 0, 1.0, alpha * torch.exp(x.clamp(max=0)))
        case "selu":
            return _SELU_SCALE * torch.where(x > 0, 1.0, _SELU_ALPHA * torch.exp(x.clamp(max=0)))
        case "softplus":
            return torch.sigmoid(x)
        case _:
            s = torch.sigmoid(x)
            return s * (1 + x * (1 - s))


def curvature(x: Tensor, act: int, alpha: float) -> Tensor:
    """d^2 act / dx^2"""
    match list(ACTIVATIONS)[act]:
        case "tanh":
            y = torch.tanh(x)
            return -2 * y * (1 - y * y)
        case "sigmoid":
            s = torch.sigmoid(x)
            return s * (1 - s) * (1 - 2 * s)
        case "elu":
            return torch.where(x > 0, 0.0, alpha * torch.exp(x.clamp(max=0)))
        case "selu":
            scale = _SELU_SCALE * _SELU_ALPHA
            return torch.where(x > 0, 0.0, scale * torch.exp(x.clamp(max=0)))
        case "softplus":
            return torch.sigmoid(x) * torch.sigmoid(-x)
        case "swish":
            s = torch.sigmoid(x)
            return s * (1 - s) * (2 + x * (1 - 2 * s))
        case _:
            return torch.zeros_like(x)

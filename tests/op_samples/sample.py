"""One row of the table of samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call: function(*args, **kwargs)."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: False where a derivative is not defined (NaN, inf) or the numeric one would be too slow
    differentiable: bool = True


@dataclass(frozen=True)
class Refusal:
    """A call that must raise `error` with `match` in its message."""

    name: str
    args: tuple[Any, ...]
    error: type[Exception]
    match: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpSamples:
    """What the table says of one operator."""

    function: Callable[..., Any]
    samples: Callable[[], list[Sample]]
    refusals: Callable[[], list[Refusal]]
    #: large calls for the benchmarks
    large: Callable[[], list[Sample]] = list
    #: 0: inference only, 1: first derivative, 2: gradients of gradients
    derivatives: int = 2
    #: positions of arguments that the operator writes to
    mutates: tuple[int, ...] = ()
    #: positions of floating arguments that the operator gives no gradient for
    constants: tuple[int, ...] = ()


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal float64, the same for the same shape and seed; after a million they repeat,
    for the benchmarks' samples would take half a minute to draw."""
    size, most = math.prod(shape), 1_000_003
    generator = torch.Generator().manual_seed(seed + sum(shape))
    numbers = torch.randn(min(size, most), dtype=torch.float64, generator=generator).mul_(scale)
    if size > most:
        numbers = torch.from_numpy(np.resize(numbers.numpy(), size))
    return numbers.view(shape)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

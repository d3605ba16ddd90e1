"""Where the noise of stochastic solvers comes from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: what draws noise: a generator, one for each sample, or a function as `draw_noise` is without it
Generator = (
    torch.Generator
    | Sequence[torch.Generator]
    | Callable[[Tensor, torch.dtype | None], Tensor]
    | None
)


def draw_noise(
    like: Tensor, generator: Generator = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Standard normal noise of `like`, drawn in `dtype` on the generator's device; a list of
    generators draws a sample each. The calls are those of diffusers, so that seeds agree."""
    if callable(generator):
        return generator(like, dtype)
    dtype, device, shape = dtype or like.dtype, like.device, like.shape
    if isinstance(generator, Sequence):
        if len(generator) != 1:
            one = (1, *shape[1:])
            parts = [
                torch.randn(one, generator=generator[i], device=generator[i].device, dtype=dtype)
                for i in range(shape[0])
            ]
            return torch.cat(parts).to(device=device, dtype=like.dtype)
        generator = generator[0]
    where = device if generator is None else generator.device
    if where.type == "cuda" and device.type != "cuda":
        raise ValueError(f"a {where.type} generator cannot draw a tensor on {device.type}")
    noise = torch.randn(shape, generator=generator, device=where, dtype=dtype)
    if where != device or dtype != like.dtype:
        noise = noise.to(device=device, dtype=like.dtype)
    return noise

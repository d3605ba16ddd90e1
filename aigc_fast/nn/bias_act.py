"""Bias, activation, gain and clamp in one pass, alone or after a matrix product."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops._activations import resolve

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class BiasAct(nn.Module):
    """clip(gain * act(x + bias), -clamp, clamp), with a bias of shape (num_features,).

    dim: the dimension of x that bias runs along; its size is num_features.
    act, alpha, gain, clamp: as for `ops.bias_act`.

    >>> BiasAct(64, act="lrelu", alpha=0.2, gain=1.0)  # nn.LeakyReLU(0.2) and a bias per channel
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 1,
        act: str = "linear",
        *,
        alpha: float | None = None,
        gain: float | None = None,
        clamp: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        resolve(act, alpha, clamp)  # refuses what is none
        self.dim, self.act, self.alpha, self.gain, self.clamp = dim, act, alpha, gain, clamp
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        bias = of_dtype(self.bias, x)
        return ops.bias_act(x, bias, self.dim, self.act, self.alpha, self.gain, self.clamp)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, dim={self.dim}, {describe(self)}"


class LinearBiasAct(nn.Linear):
    """nn.Linear whose bias and activation are one pass over the product: weight, bias as there.

    act, alpha, gain, clamp: as for `ops.bias_act`. The default gain of relu, lrelu and swish is
    sqrt(2); gain=1.0 gives the function of that name in torch.

    >>> LinearBiasAct(784, 1024, "lrelu", alpha=0.2, gain=1.0)  # nn.Linear, then LeakyReLU(0.2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act: str = "linear",
        *,
        alpha: float | None = None,
        gain: float | None = None,
        clamp: float | None = None,
        **linear: Any,
    ) -> None:
        super().__init__(in_features, out_features, **linear)
        resolve(act, alpha, clamp)
        self.act, self.alpha, self.gain, self.clamp = act, alpha, gain, clamp

    def forward(self, input: Tensor) -> Tensor:
        y = ops.linear(input, self.weight)
        bias = of_dtype(self.bias, y)
        return ops.bias_act(y, bias, -1, self.act, self.alpha, self.gain, self.clamp)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


def of_dtype(parameter: MaybeTensor, x: Tensor) -> MaybeTensor:
    """The parameter as autocast hands it over: in the dtype of the product before it."""
    return parameter if parameter is None or parameter.dtype == x.dtype else parameter.to(x.dtype)


def describe(module: Any) -> str:
    """The activation of a module and its options, for extra_repr."""
    options = {name: getattr(module, name) for name in ("act", "alpha", "gain", "clamp")}
    return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

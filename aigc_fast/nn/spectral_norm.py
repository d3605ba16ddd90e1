"""Spectral normalisation of all layers of a model in one call for each forward."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Model = TypeVar("Model", bound=nn.Module)


def spectral_norm(model: Model, n_power_iterations: int = 1, eps: float = 1e-12) -> Model:
    """Divides the weight of every linear and convolutional layer by its largest singular value.

    model: any module that is called as a whole; its layers are changed in place and it is returned.
           In training mode each call of it first runs n_power_iterations for all layers at once;
           in evaluation it takes the vectors as they are.

    The weights become weight_orig, weight_u and weight_v, as torch.nn.utils.spectral_norm (applied
    to each of these layers) names and computes them: state dicts travel in both directions.
    A model may be called several times before backward: every call has its own u and v. As with
    torch's, a model cannot be deep-copied after a call, because `weight` is then no leaf; build
    another one and load the state dict instead.

    Raises ValueError if the model has no such layer, or one that is normalised already.

    Source: Miyato et al. 2018, arXiv:1802.05957.

    >>> discriminator = spectral_norm(discriminator)
    """
    layers = [m for m in model.modules() if isinstance(m, (*_LAYERS, *_TRANSPOSED))]
    if not layers:
        raise ValueError(f"model must have linear or convolutional layers, got {model!r}")
    for layer in layers:
        if "weight" not in layer._parameters:
            raise ValueError(f"model must have plain weights, got the normalised {layer!r}")
    for layer in layers:
        weight = layer._parameters.pop("weight")
        assert weight is not None
        layer.register_parameter("weight_orig", weight)
        rows, columns = _matrix(layer).flatten(1).shape
        for name, size in (("weight_u", rows), ("weight_v", columns)):
            layer.register_buffer(name, F.normalize(weight.new_empty(size).normal_(), dim=0))
        object.__setattr__(layer, "weight", weight.data)  # to be seen before the first call
    model.register_forward_pre_hook(_SpectralNorm(layers, n_power_iterations, eps))
    return model


@torch.no_grad()
def remove_spectral_norm(model: Model) -> Model:
    """Undoes `spectral_norm`; the normalised weights, by the vectors as they are, stay.

    Raises ValueError for a model to which it was not applied.
    """
    for key, hook in model._forward_pre_hooks.items():
        if isinstance(hook, _SpectralNorm):
            hook.normalize(0)
            del model._forward_pre_hooks[key]
            break
    else:
        raise ValueError(f"model must be one that spectral_norm returned, got {model!r}")
    for layer in hook.layers:
        weight = vars(layer).pop("weight")
        del layer.weight_orig, layer.weight_u, layer.weight_v
        layer.register_parameter("weight", nn.Parameter(weight.contiguous()))
    return model


def _matrix(layer: nn.Module) -> Tensor:
    """The weight with its output channels first."""
    weight: Any = layer._parameters["weight_orig"]
    return weight.transpose(0, 1) if isinstance(layer, _TRANSPOSED) else weight


class _SpectralNorm:
    """The hook before each call of the model."""

    def __init__(self, layers: Sequence[nn.Module], n_power_iterations: int, eps: float) -> None:
        self.layers, self.n_power_iterations, self.eps = layers, n_power_iterations, eps

    def __call__(self, model: nn.Module, args: Any) -> None:
        self.normalize(self.n_power_iterations if model.training else 0)

    def normalize(self, iterations: int) -> None:
        # torch's dictionaries themselves: a lookup by name of attribute takes four times as long.
        buffers: list[Any] = [layer._buffers for layer in self.layers]
        before = [b["weight_u"] for b in buffers], [b["weight_v"] for b in buffers]
        weights = [_matrix(layer) for layer in self.layers]
        for layer in self.layers:
            # The last call's weight makes room for the new one, often in the same memory.
            object.__setattr__(layer, "weight", layer._parameters["weight_orig"])
        weights, _, u, v = ops.spectral_norm(weights, *before, iterations, self.eps)
        if iterations:
            with torch.no_grad():
                torch._foreach_copy_([*before[0], *before[1]], [*u, *v])
        for layer, weight in zip(self.layers, weights, strict=True):
            if isinstance(layer, _TRANSPOSED):
                weight = weight.transpose(0, 1)
            object.__setattr__(layer, "weight", weight)  # no parameter, no buffer

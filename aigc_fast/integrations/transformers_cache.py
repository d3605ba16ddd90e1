"""transformers' growing key/value cache, without a copy of all of it at every token."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

#: room for at least so many more tokens, and for an eighth more than there are
_ROOM = 32


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that writes behind what it has, where torch.cat would write all anew.

    `keys` and `values` are, as ever, tensors of what is cached: views of buffers with room behind
    them. What a view showed once is never written again. A layer whose tensors were replaced from
    outside (cropped, reordered, moved) copies them into new buffers at the next token.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, ...] = ()
    _views: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        # With gradients about, a saved tensor may be a view; a prompt is copied once anyway.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or length == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[-2]
        if not self._has_room(end):
            capacity = end + max(_ROOM, end // 8)
            self._buffers = _larger(self.keys, capacity), _larger(self.values, capacity)
        keys, values = self._buffers
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        self._views = self.keys, self.values
        return self.keys, self.values

    def _has_room(self, end: int) -> bool:
        return (
            bool(self._buffers)
            and self.keys is self._views[0]
            and self.values is self._views[1]
            and end <= self._buffers[0].shape[-2]
            # Torch forbids writing to what inference mode made outside of it.
            and (torch.is_inference_mode_enabled() or not self._buffers[0].is_inference())
        )


def _larger(old: Tensor, capacity: int) -> Tensor:
    new = old.new_empty(*old.shape[:-2], capacity, old.shape[-1])
    new[..., : old.shape[-2], :] = old
    return new


def grow_in_place(cache: Cache, layer: int) -> None:
    """Makes a layer that would grow by torch.cat one that grows in place; leaves all others."""
    if type(cache.layers[layer]) is DynamicLayer and not cache.offloading:
        cache.layers[layer].__class__ = GrowingLayer

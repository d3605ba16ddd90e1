"""transformers' growing key/value cache, without a copy of all of it at every token."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

#: room for at least so many more tokens, and for an eighth more than there are
_ROOM = 32


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that writes behind what it has, where torch.cat would write all anew.

    `keys` and `values` are, as ever, tensors of what is cached: views of buffers with room behind
    them. What a view showed once is never written again. A layer whose tensors were replaced from
    outside (cropped, reordered, moved), or that is a copy of another, copies them into new buffers
    at the next token.
    """

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        # With gradients about, a saved tensor may be a view; a prompt is copied once anyway.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or length == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[-2]
        keys, values = buffers = self._with_room(end)
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        _grown[self] = _Grown(buffers, (self.keys, self.values))
        return self.keys, self.values

    def _with_room(self, end: int) -> tuple[Tensor, Tensor]:
        """The buffers behind keys and values, or larger ones that begin with them."""
        grown = _grown.get(self)
        if (
            grown is not None
            and self.keys is grown.views[0]
            and self.values is grown.views[1]
            and end <= grown.buffers[0].shape[-2]
            # Torch forbids writing to what inference mode made outside of it.
            and (torch.is_inference_mode_enabled() or not grown.buffers[0].is_inference())
        ):
            return grown.buffers
        capacity = end + max(_ROOM, end // 8)
        return _larger(self.keys, capacity), _larger(self.values, capacity)


class _Grown(NamedTuple):
    buffers: tuple[Tensor, Tensor]
    views: tuple[Tensor, Tensor]


#: Beside the layers: a copy of one must not write to the same buffers, and who looks for the
#: tensors of a cache, as exporters do, finds those that transformers has.
_grown: WeakKeyDictionary[GrowingLayer, _Grown] = WeakKeyDictionary()


def _larger(old: Tensor, capacity: int) -> Tensor:
    new = old.new_empty(*old.shape[:-2], capacity, old.shape[-1])
    new[..., : old.shape[-2], :] = old
    return new


def grow_in_place(cache: Cache, layer: int) -> None:
    """Makes a layer that would grow by torch.cat one that grows in place; leaves all others."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if layer >= len(cache.layers):  # it reads the cache of another layer
        return
    if type(cache.layers[layer]) is DynamicLayer and not cache.offloading:
        cache.layers[layer].__class__ = GrowingLayer

"""Weights of others, into models that are built without any."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
#: name, shape -> the tensor of that name, or a ValueError where it is not there or has another
Fetch = Callable[[str, tuple[int, ...]], Tensor]


def fetch_from(state: Mapping[str, Tensor], source: str) -> Fetch:
    """Tensors of a state dict; errors begin with `source`."""

    def fetch(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in state:
            raise ValueError(f"{source}: tensor {name!r} is missing")
        if (found := tuple(state[name].shape)) != shape:
            raise ValueError(f"{source}: tensor {name!r} must have shape {shape}, got {found}")
        return state[name].detach()

    return fetch


def assign_state(
    model: Model,
    names: set[str],
    fetch: Fetch,
    source: str,
    rename: Callable[[str], str] = str,
) -> Model:
    """The model, in evaluation mode, with the tensors that `fetch` gives in place of its own.

    names:  of all tensors there are: ValueError for one that the model has no use for.
    rename: key of the model -> name.
    """
    state, unread = {}, set(names)
    for key, like in model.state_dict().items():
        name = rename(key)
        unread.discard(name)
        state[key] = fetch(name, tuple(like.shape))
    if unread:
        raise ValueError(f"{source}: no use is known for tensor {min(unread)!r}")
    model.load_state_dict(state, assign=True)
    return model.eval()

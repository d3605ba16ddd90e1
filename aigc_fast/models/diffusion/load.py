"""diffusers' configurations and checkpoints, from sources not trusted."""

import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast.io.hf_folder import read_hf_folder
from aigc_fast.models.state import Fetch, Model, assign_state, fetch_from


def resolve(
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    fixed: Mapping[str, Any],
    optional: tuple[str, ...] = (),
) -> Any:
    """The options of a diffusers configuration, as attributes.

    options: name -> default, of those that the model has.
    fixed:   name -> the only supported value, of the others.
    optional: names of options that may be None though their default is not.

    Raises ValueError for an unsupported value or an unknown name.
    """
    found = dict(options)
    for name, value in config.items():
        if name in options:
            found[name] = tuple(value) if isinstance(value, list) else value
            if not (_fits(found[name], options[name]) or (value is None and name in optional)):
                raise ValueError(f"{name} must be like {options[name]!r}, got {value!r}")
        elif name in fixed:
            if value != fixed[name]:
                raise ValueError(f"{name} must be {fixed[name]!r}, got {value!r}")
        elif not name.startswith("_"):
            raise ValueError(f"no option {name!r} is known")
    return SimpleNamespace(**found)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value, or each of a tuple's, is of the kind of the default."""
    if value is None or (isinstance(default, tuple) and not isinstance(value, tuple)):
        return value is default
    first = default[0] if isinstance(default, tuple) else default
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(first, bool | str):
            if type(item) is not type(first):
                return False
        elif type(item) not in (int, float) or item < 0:
            return False
    return True


class DiffusersModel(nn.Module):
    """A model that is built from a configuration of diffusers and has diffusers' names."""

    @classmethod
    def from_diffusers(
        cls: type[Model], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
    ) -> Model:
        """A model that shares the tensors of a diffusers model: its `config`, its `state_dict()`.

        ValueError names the first tensor that is missing, has another shape, or has no use.
        """
        fetch = fetch_from(state_dict, "state")
        return _load(cls, config, set(state_dict), fetch, "state")

    @classmethod
    def from_pretrained(
        cls: type[Model], path: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> Model:
        """Reads the folder that diffusers' save_pretrained wrote (config.json and safetensors).

        dtype: of the weights; None leaves that of the file, and maps the file into memory.

        OSError where a file cannot be opened, ValueError where one is unsound or does not fit.
        """
        folder = read_hf_folder(path, "diffusion_pytorch_model")

        def fetch(name: str, shape: tuple[int, ...]) -> Tensor:
            tensor = folder.get_tensor(name, shape)
            return tensor if dtype is None else tensor.to(dtype)

        return _load(cls, folder.config, set(folder.tensors), fetch, folder.path)


_EARLY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def early_name(key: str) -> str:
    """What early checkpoints call a parameter of attention; other keys are their own."""
    module, _, kind = key.rpartition(".")
    for new, early in _EARLY.items():
        if module.endswith(new):
            return f"{module.removesuffix(new)}{early}.{kind}"
    return key


def _load(
    build: Callable[[Mapping[str, Any]], Model],
    config: Mapping[str, Any],
    names: set[str],
    fetch: Fetch,
    source: str,
) -> Model:
    try:
        with torch.device("meta"):  # shapes alone: no weight is made to be thrown away
            model = build(config)
    except ValueError as error:
        raise ValueError(f"{source}: config: {error}") from None

    def rename(key: str) -> str:
        early = early_name(key)
        return early if key not in names and early in names else key

    return assign_state(model, names, fetch, source, rename)

"""The folders that save_pretrained of transformers and diffusers writes: read, not trusted, and
written.

Weights come from safetensors alone: a pickle can run any code. The package safetensors checks a
file's header against its size and maps the tensors; what it leaves open is checked here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._whole import written_whole

_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class HFFolder:
    """The config and the memory-mapped tensors of one folder.

    Attributes:
        config: what config.json says.
        tensors: name -> the safetensors file (an open `safe_open`) that has it.
    """

    path: str
    config: dict[str, Any]
    tensors: dict[str, Any]

    def get_tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor of that name, which must be there and have that shape, if one is given;
        memory-mapped."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        part = self.tensors[name].get_slice(name)
        found = tuple(part.get_shape())
        if shape is not None and found != shape:
            raise ValueError(f"{self.path}: tensor {name!r} must have shape {shape}, got {found}")
        if (dtype := part.get_dtype()) not in _DTYPES:
            raise ValueError(
                f"{self.path}: tensor {name!r} must be one of {sorted(_DTYPES)}, got {dtype}"
            )
        return self.tensors[name].get_tensor(name)


def read_hf_folder(path: str | os.PathLike[str], stem: str = "model") -> HFFolder:
    """Reads config.json and maps <stem>.safetensors, or the shards that its index names.

    stem: "model" is transformers', "diffusion_pytorch_model" that of diffusers.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is unsound; the message names it and the fault.
        ImportError: the package `safetensors` is not installed.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    single = f"{stem}.safetensors"
    index = f"{single}.index.json"
    if (folder / index).is_file():
        return HFFolder(str(folder), config, _open_shards(folder, index))
    if not (folder / single).is_file():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        if pickled is not None:
            raise ValueError(
                f"{folder}: {pickled.name} is a pickle, which is not read because it can run any "
                f"code; there must be a {single} (save_pretrained writes one)"
            )
        raise ValueError(f"{folder}: there is neither {single} nor {index}")
    return HFFolder(str(folder), config, open_safetensors(folder / single))


def write_hf_folder(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes config.json and model.safetensors; each is written whole, or stays as it was.

    Raises:
        OSError: a file cannot be written.
        ImportError: the package `safetensors` is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("this needs the package safetensors: pip install safetensors") from error
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    # The old file may be mapped by this very model: it must stay until then, and is not written to.
    with written_whole(weights) as partial:
        # transformers refuses a file that does not name its framework.
        save_file(dict(tensors), partial, {"format": "pt"})
        # Shards from before: their index would be preferred.
        (folder / f"{weights.name}.index.json").unlink(missing_ok=True)
    write_json(folder / "config.json", config)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, or leaves the file as it was."""
    with written_whole(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _open_shards(folder: Path, name: str) -> dict[str, Any]:
    index = folder / name
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: 'weight_map' must be an object that is not empty")
    tensors: dict[str, Any] = {}
    names = list(weight_map.values())
    for shard in names:
        _check_shard_name(index, shard)
    for shard in sorted(set(names)):
        if not (folder / shard).is_file():
            raise ValueError(f"{index}: the shard {shard!r} is missing")
        opened = open_safetensors(folder / shard)
        if twice := tensors.keys() & opened.keys():
            raise ValueError(f"{folder / shard}: tensor {min(twice)!r} is in another shard too")
        for tensor, file in weight_map.items():
            if file == shard and tensor not in opened:
                raise ValueError(f"{folder / shard}: tensor {tensor!r} is missing")
        tensors |= opened
    return tensors


def _check_shard_name(index: Path, shard: object) -> None:
    """A shard lies in the folder itself, so that no index makes us open another file."""
    plain = isinstance(shard, str) and not any(mark in shard for mark in ("/", "\\", ":", "\0"))
    if not plain or not str(shard).endswith(".safetensors"):
        raise ValueError(
            f"{index}: a shard must be the plain name of a .safetensors file, got {shard!r}"
        )


def open_safetensors(path: Path) -> dict[str, Any]:
    """Name -> the open file, for every tensor of one safetensors file; errors as above."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("this needs the package safetensors: pip install safetensors") from error
    try:
        file = safe_open(path, framework="pt")
        return dict.fromkeys(file.keys(), file)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a sound safetensors file: {error}") from None
    except OSError as error:  # safetensors leaves the name out
        raise OSError(f"{path}: {error}") from None

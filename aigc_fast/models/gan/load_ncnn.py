"""Real-ESRGAN's generators from the files of ncnn.

A file names layers and blobs as its converter pleased. So the graph is held against the one that
the generator of the file's sizes has, layer by layer, and the weights are taken in that order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from aigc_fast.io.ncnn import NcnnLayer, NcnnNetwork, Value, read_ncnn

from .rrdb import RRDBNet
from .srvgg import SRVGGNetCompact

Generator = SRVGGNetCompact | RRDBNet
G = TypeVar("G", SRVGGNetCompact, RRDBNet)


def load_generator(path: str | os.PathLike[str]) -> Generator:
    """The generator of Real-ESRGAN that ncnn's files hold, `SRVGGNetCompact` or `RRDBNet`.

    path: the .param file, the .bin file, or their common name without a suffix.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is not sound, or is of another network.
    """
    network = read_ncnn(path)
    if any(layer.kind == "PReLU" for layer in network.layers):
        return _build(network, SRVGGNetCompact)
    return _build(network, RRDBNet)


def read_generator(path: str | os.PathLike[str], kind: type[G]) -> G:
    return _build(read_ncnn(path), kind)


def _build(network: NcnnNetwork, kind: type[G]) -> G:
    found = list(_nodes(network))
    try:
        options, expected = (_compact if kind is SRVGGNetCompact else _rrdb)(found)
        for node, wanted in zip(found, expected, strict=False):
            if node[:3] != wanted[:3]:
                raise ValueError(f"layer {node.layer.name!r} is {node}, expected {wanted}")
        if len(found) != len(expected):
            raise ValueError(f"it has {len(found)} layers, expected {len(expected)}")
    except ValueError as error:
        raise ValueError(f"{network.path}: not a {kind.__name__}: {error}") from None
    with torch.device("meta"):
        model = kind(**options)
    model.load_state_dict(dict(_state(model, found)), assign=True)
    return model.eval()


def _state(model: nn.Module, nodes: list[_Node]) -> Iterator[tuple[str, Tensor]]:
    layers = [node.layer for node in nodes if node.layer.weights]
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.PReLU)]
    for (name, module), layer in zip(modules, layers, strict=True):
        if isinstance(module, nn.PReLU):
            yield f"{name}.weight", layer.tensor("slope", *module.weight.shape)
        else:
            yield f"{name}.weight", layer.tensor("weight", *module.weight.shape)
            yield f"{name}.bias", layer.tensor("bias", module.out_channels)


# ---- the graph of a file, and those of the generators ------------------------------------------


class _Node(NamedTuple):
    """A layer: its inputs are the numbers of the layers that compute them."""

    kind: str
    inputs: tuple[int, ...]
    params: dict[int, Value]
    layer: NcnnLayer = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"{self.kind} of {self.inputs} with {self.params}"


def _nodes(network: NcnnNetwork) -> Iterator[_Node]:
    """The layers without Split, which only gives a blob more names."""
    source: dict[str, int] = {}
    count = 0
    for layer in network.layers:
        inputs = tuple(source[blob] for blob in layer.inputs)
        if layer.kind == "Split" and len(inputs) == 1:
            source |= dict.fromkeys(layer.outputs, inputs[0])
            continue
        source |= dict.fromkeys(layer.outputs, count)
        count += 1
        yield _Node(layer.kind, inputs, _significant(layer), layer)


def _significant(layer: NcnnLayer) -> dict[int, Value]:
    """The parameters that are not what they would be if they were left out."""
    params = {} if layer.kind == "Input" else dict(layer.params)
    if layer.kind == "Convolution":
        # Height, where it is given, after width, of kernel, dilation and stride; padding likewise.
        for width, others, default in ((1, (11,), 0), (2, (12,), 1), (3, (13,), 1), (4, _SIDES, 0)):
            value = params.get(width, default)
            params |= {width: 0 if value == default else value}
            params |= {key: 0 for key in others if params.get(key) == value}
    return {key: value for key, value in params.items() if value != 0}


class _Graph(list[_Node]):
    """The layers that a generator should have."""

    def add(self, kind: str, *inputs: int, **params: Value) -> int:
        """Appends a layer and gives its number; parameter 3 is called p3."""
        numbered = {int(key[1:]): value for key, value in params.items()}
        self.append(_Node(kind, inputs, numbered))
        return len(self) - 1

    def conv(self, inputs: tuple[int, ...], channels: int, out: int, leaky: bool = False) -> int:
        x = inputs[0] if len(inputs) == 1 else self.add("Concat", *inputs)
        act: dict[str, Value] = {"p9": 2, "p10": [0.2]} if leaky else {}
        return self.add("Convolution", x, p0=out, p1=3, p4=1, p5=1, p6=out * channels * 9, **act)

    def resize(self, x: int, kind: int, factor: float) -> int:
        return self.add("Interp", x, p0=kind, p1=factor, p2=factor)


_NEAREST, _BICUBIC = 1, 3
_SIDES = (14, 15, 16)


def _convolutions(nodes: list[_Node]) -> tuple[list[NcnnLayer], int, int]:
    """The convolutions, and the channels before and after the first."""
    layers = [node.layer for node in nodes if node.kind == "Convolution"]
    if len(layers) < 2:
        raise ValueError("it has less than two convolutions")
    features = int(layers[0].get(0, 0))
    return layers, len(layers[0].weights["weight"]) // (9 * features), features


def _compact(nodes: list[_Node]) -> tuple[dict[str, int], _Graph]:
    layers, channels, features = _convolutions(nodes)
    shuffles = [node.layer.get(0, 1) for node in nodes if node.kind == "PixelShuffle"]
    upscale = shuffles[0] if shuffles else 0
    if not isinstance(upscale, int) or not 1 <= upscale <= 16:
        raise ValueError("it must shuffle the pixels of blocks of 1 to 16")
    last = int(layers[-1].get(0, 0))
    if last != channels * upscale**2:
        raise ValueError(f"{last} channels are no {channels} of {upscale} * {upscale} pixels")
    factor = nodes[-1].layer.get(1, 1.0) if nodes[-1].kind == "Interp" else 1.0
    if not 0 < factor <= 16 or factor * upscale % 1:
        raise ValueError(f"it must enlarge by a whole number, not by {factor} * {upscale}")
    graph = _Graph()
    y = x = graph.add("Input")
    for i in range(len(layers) - 1):
        y = graph.conv((y,), features if i else channels, features)
        y = graph.add("PReLU", y, p0=features)
    y = graph.add("PixelShuffle", graph.conv((y,), features, last), p0=upscale)
    y = graph.add("BinaryOp", y, graph.resize(x, _NEAREST, upscale))
    if factor != 1:
        graph.resize(y, _BICUBIC, factor)
    options = {"num_in_ch": channels, "num_out_ch": channels, "num_feat": features}
    options |= {"num_conv": len(layers) - 2, "upscale": upscale, "scale": int(factor * upscale)}
    return options, graph


def _rrdb(nodes: list[_Node]) -> tuple[dict[str, int], _Graph]:
    layers, channels, features = _convolutions(nodes)
    blocks, grow, last = len(layers) // 15, int(layers[1].get(0, 0)), int(layers[-1].get(0, 0))
    graph = _Graph()
    first = y = graph.conv((graph.add("Input"),), channels, features)
    for _ in range(blocks):
        block = y
        for _ in range(3):
            parts: tuple[int, ...] = (y,)
            for i in range(4):
                parts += (graph.conv(parts, features + i * grow, grow, leaky=True),)
            last_of_block = graph.conv(parts, features + 4 * grow, features)
            y = graph.add("Eltwise", last_of_block, y, p0=1, p1=[0.2, 1.0])
        y = graph.add("Eltwise", y, block, p0=1, p1=[0.2, 1.0])
    y = graph.add("BinaryOp", first, graph.conv((y,), features, features))
    for _ in range(2):
        y = graph.conv((graph.resize(y, _NEAREST, 2.0),), features, features, leaky=True)
    graph.conv((graph.conv((y,), features, features, leaky=True),), features, last)
    options = {"num_in_ch": channels, "num_out_ch": last, "num_feat": features}
    return options | {"num_block": blocks, "num_grow_ch": grow}, graph

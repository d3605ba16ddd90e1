"""VITS from the ONNX files of Piper's voices.

The file holds the weights under the original's names, but for those that the exporter folded: the
convolutions with weight norm, named by number, are known by their biases or nodes; the embeddings
by what picks rows of them. Sizes come from shapes and from the attributes of convolutions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from aigc_fast.io.hf_folder import read_json
from aigc_fast.io.onnx import OnnxFile, OnnxNode, read_onnx
from aigc_fast.models.state import assign_state, fetch_from

from .hifigan import LAST_SLOPE, SLOPE
from .piper_config import number, piper_config
from .vits import VITS

_PARTS = ("enc_p.", "dp.", "flow.", "dec.", "emb_g.")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def load_piper(path: str | os.PathLike[str]) -> VITS:
    """See `VITS.from_pretrained`."""
    described = read_json(Path(f"{path}.json"))
    file = read_onnx(path)
    names = dict(_names(file))
    try:
        convolutions = dict(_convolutions(file, names))
        config = piper_config(
            described, {ours: file.shape(n) for ours, n in names.items()}, convolutions
        )
        with torch.device("meta"):
            model = VITS(config)
        _check_graph(model, file, convolutions)
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a voice of Piper: {message}") from None
    state = {ours: file.get_tensor(name) for ours, name in names.items()}
    if _INVERSE in state:
        state["dp.flows.0.logs"] = _logs(state.pop(_INVERSE), file.path)
    return assign_state(model, set(state), fetch_from(state, file.path), file.path)


#: exp(-logs), where the exporter computed it
_INVERSE = "dp.flows.0.inverse"


def _names(file: OnnxFile) -> Iterator[tuple[str, str]]:
    """The original's name and the file's, of every weight."""
    for name in file.tensors:
        if name.startswith(_PARTS):
            yield name, name
    subtracted = None  # what m was taken from
    for node in file.nodes:
        weights = [name for name in node.inputs if name in file.tensors]
        if node.kind in _CONVOLUTIONS and len(node.inputs) > 1:
            if (name := node.inputs[1]) in file.tensors:
                yield _name_of(node), name
        elif node.kind == "Gather" and len(weights) == 1 and node.inputs[0] == weights[0]:
            if node.inputs[1:] == file.inputs[:1]:  # the phonemes
                yield "enc_p.emb.weight", weights[0]
            elif node.inputs[1:] == ("sid",):
                yield "emb_g.weight", weights[0]
        elif node.kind == "Sub" and weights == ["dp.flows.0.m"]:
            subtracted = node.outputs
        elif node.kind == "Mul" and weights and node.inputs[:1] == subtracted:
            yield _INVERSE, weights[0]


def _name_of(node: OnnxNode) -> str:
    """The original's name of the weight of a convolution."""
    if len(node.inputs) > 2 and node.inputs[2].endswith(".bias"):
        return node.inputs[2].removesuffix("bias") + "weight"
    if node.inputs[1].startswith(_PARTS):
        return node.inputs[1]
    return ".".join(node.name.strip("/").split("/")[:-1]) + ".weight"


def _convolutions(file: OnnxFile, names: Mapping[str, str]) -> Iterator[tuple[str, OnnxNode]]:
    """The original's name of a layer and its node; a layer has one node."""
    seen = set()
    for node in file.nodes:
        if node.kind in _CONVOLUTIONS and len(node.inputs) > 1 and node.inputs[1] in file.tensors:
            name = _name_of(node).removesuffix(".weight")
            if name in seen or names.get(f"{name}.weight") != node.inputs[1]:
                raise ValueError(f"two nodes are the convolution {name}")
            seen.add(name)
            yield name, node


def _check_graph(model: VITS, file: OnnxFile, convolutions: Mapping[str, OnnxNode]) -> None:
    """ValueError where the graph has convolutions other than the model's, or other slopes."""
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)
    }
    for name, node in convolutions.items():
        if (layer := layers.get(name)) is None:
            raise ValueError(f"no use is known for the convolution {name}")
        kind = "ConvTranspose" if isinstance(layer, nn.ConvTranspose1d) else "Conv"
        found = (node.kind, *(number(convolutions, name, key) for key in ("strides", "dilations")))
        expected = (kind, layer.stride[0], layer.dilation[0])
        if found != expected or node.attributes.get("group", 1) != layer.groups:
            raise ValueError(f"{name} is {found}, expected {expected}")
    alphas = [n.attributes.get("alpha", LAST_SLOPE) for n in file.nodes if n.kind == "LeakyRelu"]
    slopes = {round(alpha, 7) for alpha in alphas if isinstance(alpha, float)}  # single precision
    if slopes - {SLOPE, LAST_SLOPE}:
        raise ValueError(f"slopes of leaky ReLUs must be {SLOPE} and {LAST_SLOPE}, got {slopes}")


def _logs(inverse: Tensor, path: str) -> Tensor:
    if not bool((inverse > 0).all()):
        raise ValueError(f"{path}: exp(-logs) of dp.flows.0 must be positive, got {inverse}")
    return -inverse.log()

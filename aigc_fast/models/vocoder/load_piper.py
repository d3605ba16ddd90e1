"""VITS from the ONNX files of Piper's voices.

The file holds the weights under the original's names, but for those that the exporter folded: the
convolutions with weight norm, named by number, are known by their biases or nodes; the embeddings
by what picks rows of them. Sizes come from shapes and from the attributes of convolutions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast.io.hf_folder import read_json
from aigc_fast.io.onnx import OnnxFile, OnnxNode, read_onnx
from aigc_fast.models.state import assign_state, fetch_from

from .hifigan import LAST_SLOPE, SLOPE
from .vits import VITS, VITSConfig

_PARTS = ("enc_p.", "dp.", "flow.", "dec.", "emb_g.")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def load_piper(path: str | os.PathLike[str]) -> VITS:
    """See `VITS.from_pretrained`."""
    described = read_json(Path(f"{path}.json"))
    file = read_onnx(path)
    names = dict(_names(file))
    try:
        convolutions = dict(_convolutions(file, names))
        config = _config(
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


# ---- sizes ---------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


def _config(described: Any, shapes: Shapes, convolutions: Mapping[str, OnnxNode]) -> VITSConfig:
    def dim(name: str, at: int) -> int:
        if len(shapes.get(name, ())) <= at:
            raise ValueError(f"tensor {name!r} is missing or has less than {at + 1} dimensions")
        return shapes[name][at]

    def count(pattern: str) -> int:
        return len({m[0] for name in shapes if (m := re.match(pattern, name))})

    audio, inference = (_section(described, key) for key in ("audio", "inference"))
    speakers = described.get("num_speakers", 1)
    hidden, head = dim("enc_p.emb.weight", 1), dim("enc_p.encoder.attn_layers.0.emb_rel_k", 2)
    stochastic = "dp.pre.weight" in shapes
    options: dict[str, Any] = {}
    if stochastic:
        options = dict(
            duration_kernel_size=dim("dp.convs.convs_sep.0.weight", 2),
            duration_layers=count(r"dp\.convs\.convs_sep\.\d+\."),
            duration_bins=(dim("dp.flows.3.proj.weight", 0) + 1) // 3,
            # The one next to the affine layer, which nothing hears, is not in the file.
            duration_flows=count(r"dp\.flows\.(?!0\.|1\.)\d+\.") + 1,
        )
    else:
        options = dict(
            duration_channels=dim("dp.conv_1.weight", 0),
            duration_kernel_size=dim("dp.conv_1.weight", 2),
        )
    wavenet = "flow.flows.0.enc.in_layers"
    layers = count(rf"{re.escape(wavenet)}\.\d+\.")
    config = VITSConfig(
        vocab_size=dim("enc_p.emb.weight", 0),
        decoder=_decoder(shapes, convolutions),
        latent_channels=dim("enc_p.proj.weight", 0) // 2,
        hidden_channels=hidden,
        filter_channels=dim("enc_p.encoder.ffn_layers.0.conv_1.weight", 0),
        num_heads=hidden // max(head, 1),
        num_layers=count(r"enc_p\.encoder\.attn_layers\.\d+\."),
        kernel_size=dim("enc_p.encoder.ffn_layers.0.conv_1.weight", 2),
        window=dim("enc_p.encoder.attn_layers.0.emb_rel_k", 1) // 2,
        flow_couplings=count(r"flow\.flows\.\d+\."),
        wavenet_kernel_size=dim(f"{wavenet}.0.weight", 2),
        wavenet_dilation_rate=_number(convolutions, f"{wavenet}.1", "dilations")
        if layers > 1
        else 1,
        wavenet_layers=layers,
        stochastic_duration=stochastic,
        num_speakers=speakers,
        speaker_channels=dim("emb_g.weight", 1) if speakers != 1 else 0,
        sample_rate=audio.get("sample_rate", 22050),
        noise_scale=inference.get("noise_scale", 0.667),
        length_scale=inference.get("length_scale", 1.0),
        noise_scale_duration=inference.get("noise_w", 0.8),
        **options,
    )
    if described.get("num_symbols", config.vocab_size) != config.vocab_size:
        symbols = described["num_symbols"]
        raise ValueError(f"num_symbols must be {config.vocab_size}, got {symbols!r}")
    return config


def _section(described: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = described.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{key!r} of the configuration must be an object, got {section!r}")
    return section


def _decoder(shapes: Shapes, convolutions: Mapping[str, OnnxNode]) -> dict[str, Any]:
    """The arguments of the decoder."""
    first = convolutions.get("dec.conv_pre")
    stages = len([name for name in convolutions if re.fullmatch(r"dec\.ups\.\d+", name)])
    blocks = len({m[0] for name in shapes if (m := re.match(r"dec\.resblocks\.\d+\.", name))})
    if first is None or not stages or not blocks or blocks % stages:
        raise ValueError(f"the decoder has {stages} stages and {blocks} residual blocks")
    pairs = "dec.resblocks.0.convs1.0" in convolutions
    convs = "convs1" if pairs else "convs"
    kernels, dilations = [], []
    for block in range(blocks // stages):
        name = f"dec.resblocks.{block}.{convs}"
        layers = len([key for key in convolutions if re.fullmatch(rf"{name}\.\d+", key)])
        dilations.append([_number(convolutions, f"{name}.{i}", "dilations") for i in range(layers)])
        kernels.append(_last(shapes, f"{name}.0.weight"))
    ups = [f"dec.ups.{i}" for i in range(stages)]
    return dict(
        upsample_rates=[_number(convolutions, name, "strides") for name in ups],
        upsample_kernel_sizes=[_last(shapes, f"{name}.weight") for name in ups],
        upsample_initial_channel=shapes["dec.conv_pre.weight"][0],
        resblock_kernel_sizes=kernels,
        resblock_dilation_sizes=dilations,
        resblock="1" if pairs else "2",
    )


def _last(shapes: Shapes, name: str) -> int:
    if not shapes.get(name):
        raise ValueError(f"tensor {name!r} is missing")
    return shapes[name][-1]


def _number(convolutions: Mapping[str, OnnxNode], name: str, attribute: str) -> int:
    """A stride or dilation of a convolution over time; 1 where it is not given."""
    if name not in convolutions:
        raise ValueError(f"the convolution {name} is missing")
    value = convolutions[name].attributes.get(attribute, (1,))
    if not isinstance(value, tuple) or len(value) != 1:
        raise ValueError(f"{attribute} of {name} must be one number, got {value}")
    return value[0]


# ---- what shapes do not show ---------------------------------------------------------------------


def _check_graph(model: VITS, file: OnnxFile, convolutions: Mapping[str, OnnxNode]) -> None:
    """ValueError where the graph has convolutions other than the model's, or other slopes."""
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)
    }
    for name, node in convolutions.items():
        if (layer := layers.get(name)) is None:
            raise ValueError(f"no use is known for the convolution {name}")
        kind = "ConvTranspose" if isinstance(layer, nn.ConvTranspose1d) else "Conv"
        found = (node.kind, *(_number(convolutions, name, key) for key in ("strides", "dilations")))
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

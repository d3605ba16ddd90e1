"""The sizes of Piper's voices, from shapes, convolutions and the file beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from aigc_fast.io.onnx import OnnxNode

from .vits_config import VITSConfig

Shapes = Mapping[str, tuple[int, ...]]


def piper_config(
    described: Mapping[str, Any], shapes: Shapes, convolutions: Mapping[str, OnnxNode]
) -> VITSConfig:
    """The sizes of a voice.

    described:    what the .onnx.json says.
    shapes:       of the weights, by the original's names.
    convolutions: the original's name of a layer -> its node.

    ValueError names what is missing or will not do.
    """
    dim = partial(_dim, shapes)

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
        wavenet_dilation_rate=number(convolutions, f"{wavenet}.1", "dilations")
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
    stages = len([name for name in convolutions if re.fullmatch(r"dec\.ups\.\d+", name)])
    blocks = len({m[0] for name in shapes if (m := re.match(r"dec\.resblocks\.\d+\.", name))})
    if not stages or not blocks or blocks % stages:
        raise ValueError(f"the decoder has {stages} stages and {blocks} residual blocks")
    pairs = "dec.resblocks.0.convs1.0" in convolutions
    convs = "convs1" if pairs else "convs"
    kernels, dilations = [], []
    for block in range(blocks // stages):
        name = f"dec.resblocks.{block}.{convs}"
        layers = len([key for key in convolutions if re.fullmatch(rf"{name}\.\d+", key)])
        dilations.append([number(convolutions, f"{name}.{i}", "dilations") for i in range(layers)])
        kernels.append(_dim(shapes, f"{name}.0.weight", 2))
    ups = [f"dec.ups.{i}" for i in range(stages)]
    return dict(
        upsample_rates=[number(convolutions, name, "strides") for name in ups],
        upsample_kernel_sizes=[_dim(shapes, f"{name}.weight", 2) for name in ups],
        upsample_initial_channel=_dim(shapes, "dec.conv_pre.weight", 0),
        resblock_kernel_sizes=kernels,
        resblock_dilation_sizes=dilations,
        resblock="1" if pairs else "2",
    )


def _dim(shapes: Shapes, name: str, at: int) -> int:
    if len(shapes.get(name, ())) <= at:
        raise ValueError(f"tensor {name!r} is missing or has less than {at + 1} dimensions")
    return shapes[name][at]


def number(convolutions: Mapping[str, OnnxNode], name: str, attribute: str) -> int:
    """A stride or dilation of a convolution over time; 1 where it is not given."""
    if name not in convolutions:
        raise ValueError(f"the convolution {name} is missing")
    value = convolutions[name].attributes.get(attribute, (1,))
    if not isinstance(value, tuple) or len(value) != 1:
        raise ValueError(f"{attribute} of {name} must be one number, got {value}")
    return value[0]

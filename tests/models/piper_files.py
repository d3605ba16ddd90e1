"""Writes a VITS as Piper's exporter does: folded weights by number, embeddings under odd names."""

import json
import re

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from aigc_fast.models.vocoder import VITS, VITSConfig

SMALL = dict(
    vocab_size=9,
    decoder=dict(
        upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
        upsample_initial_channel=8,
        resblock_kernel_sizes=[3, 5],
        resblock_dilation_sizes=[[1, 2], [2, 3]],
        resblock="2",
    ),
    latent_channels=6,
    hidden_channels=8,
    filter_channels=10,
    num_heads=2,
    num_layers=2,
    window=2,
    flow_couplings=2,
    wavenet_layers=2,
    wavenet_dilation_rate=2,
    duration_channels=5,
    duration_layers=2,
    duration_bins=4,
    sample_rate=8000,
)


def small_vits(**options):
    model = VITS(VITSConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def tensor(name, value):
    return helper.make_tensor(
        name,
        TensorProto.FLOAT,
        value.shape,
        value.detach().numpy().astype("<f4").tobytes(),
        raw=True,
    )


def voice(model):
    """The ONNX model and the JSON beside it."""
    state, nodes, weights = model.state_dict(), [], []
    c = model.config

    def node(kind, inputs, output, name="", **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))

    def gather(name, index, ours):
        weights.append(tensor(name, state.pop(ours)))
        node("Gather", [name, index], f"/{ours}", f"/{ours}/Gather")

    gather("sid" if c.num_speakers == 1 else "onnx::Gather_7", "input", "enc_p.emb.weight")
    if c.num_speakers > 1:
        gather("emb_g.weight", "sid", "emb_g.weight")
    if c.stochastic_duration:
        logs = state.pop("dp.flows.0.logs")
        weights.append(tensor("/dp/flows.0/Exp_output_0", torch.exp(-logs)))
        node("Sub", ["z", "dp.flows.0.m"], "/dp/flows.0/Sub_output_0")
        node("Mul", ["/dp/flows.0/Sub_output_0", "/dp/flows.0/Exp_output_0"], "y")
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            continue
        weight = f"{name}.weight"
        if name.startswith("flow") and ".enc." in name:  # with weight norm
            weight = f"onnx::Conv_{len(nodes)}"
            weights.append(tensor(weight, state.pop(f"{name}.weight")))
        kind = "ConvTranspose" if isinstance(layer, nn.ConvTranspose1d) else "Conv"
        inputs = ["x", weight] + ([f"{name}.bias"] if layer.bias is not None else [])
        node(
            kind, inputs, f"/{name}", f"/{name.replace('.', '/')}/{kind}", group=layer.groups,
            strides=layer.stride, dilations=layer.dilation,
        )  # fmt: skip
    for alpha in (0.1, 0.01):
        node("LeakyRelu", ["x"], f"/leaky{alpha}", f"leaky{alpha}", alpha=alpha)
    weights += [tensor(name, value) for name, value in state.items()]
    weights.append(tensor("/dp/Constant_output_0", torch.ones(())))
    inputs = ["input", "input_lengths", "scales"] + (["sid"] if c.num_speakers > 1 else [])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
    graph = helper.make_graph(nodes, "voice", values, [], weights)
    described = dict(
        audio=dict(sample_rate=c.sample_rate),
        inference=dict(noise_scale=0.5, length_scale=1.5, noise_w=0.25),
        num_symbols=c.vocab_size,
        num_speakers=c.num_speakers,
        espeak=dict(voice="en-us"),
        phoneme_id_map={
            "_": [0],
            "^": [1],
            "$": [2],
            " ": [3],
            "a": [4],
            "b": [5],
            ".": [6],
            "e": [7],
        },
    )
    return helper.make_model(graph), described


def write_voice(path, model, change=lambda onnx_model, described: None):
    """Writes both files; `change` may spoil them first."""
    onnx_model, described = voice(model)
    change(onnx_model, described)
    onnx.save(onnx_model, path)
    path.with_name(f"{path.name}.json").write_text(json.dumps(described))
    return path


def find_node(onnx_model, pattern):
    return next(node for node in onnx_model.graph.node if re.search(pattern, node.name))

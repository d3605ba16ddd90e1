"""Models into Hugging Face folders: the inverse of load_hf.py, by the same table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigc_fast.io.hf_folder import write_hf_folder
from aigc_fast.nn import QuantizedLinear

from .architectures import ARCHITECTURES, Architecture, Fields
from .config import DecoderConfig
from .load_hf import LONGROPE, read_hf_config
from .rope import RopeScaling
from .weights import disassemble

if TYPE_CHECKING:
    from .decoder_lm import DecoderLM


def save_hf_model(
    path: str | os.PathLike[str], model: DecoderLM, shapes: Mapping[str, torch.Size]
) -> None:
    """Writes config.json and model.safetensors.

    Args:
        shapes: of the state dict of a new model of the same config.

    Raises:
        ValueError: `model` has packed weights or replaced layers, or no architecture has its
            config.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "model must have dense weights, these are packed: from_pretrained(packed=False)"
        )
    state = {name: weight.detach() for name, weight in model.state_dict().items()}
    found = {name: weight.shape for name, weight in state.items()}
    if differing := sorted(name for name, _ in found.items() ^ shapes.items()):
        raise ValueError(f"model must have the weights of its config, {differing[0]} is not so")
    kind, config = describe(model.config)
    architecture = ARCHITECTURES[kind]
    config |= model.special_token_ids
    config["torch_dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_hf_folder(path, config, _hf_state_dict(state, model.config, architecture))


def _hf_state_dict(
    state: Mapping[str, Tensor], config: DecoderConfig, architecture: Architecture
) -> dict[str, Tensor]:
    tensors = {}
    for part, layer, kind, weight in disassemble(state, config, architecture):
        if architecture.offset_norms and part.endswith("norm"):
            # In fp32: 16 bits do not hold what is left of a small weight less one.
            weight = weight.to(torch.promote_types(torch.float32, weight.dtype)) - 1
        if architecture.is_transposed(layer, tuple(weight.shape)):
            weight = weight.t()
        names = architecture.weight_names(part, layer, kind, config.num_experts)
        for name, piece in zip(names, weight.chunk(len(names)), strict=True):
            # safetensors takes no two tensors of one storage, and views of it only whole.
            tensors[name] = piece.clone(memory_format=torch.contiguous_format)
    return tensors


def describe(config: DecoderConfig) -> tuple[str, dict[str, Any]]:
    """The `model_type` and the config.json that read_hf_config makes `config` of again.

    Raises:
        ValueError: there is no such architecture.
    """
    for kind, architecture in ARCHITECTURES.items():
        written = _write_config(config, architecture)
        try:
            read = read_hf_config(written, architecture, config.num_layers)
        except ValueError:
            continue
        if _normal(read) == _normal(config):
            return kind, {
                "architectures": [architecture.model_class],
                "model_type": kind,
                **written,
            }
    raise ValueError(
        f"config must be that of one of {sorted(ARCHITECTURES)} as config.json can say it, "
        f"got {config}"
    )


def _normal(config: DecoderConfig) -> DecoderConfig:
    """What means the same said in one way."""
    return replace(
        config,
        attention_scale=config.attention_scale or config.head_dim**-0.5,
        windows=config.windows if any(config.windows) else (),
        rope_layers=() if all(config.rope_layers) else config.rope_layers,
    )


def _write_config(config: DecoderConfig, architecture: Architecture) -> Fields:
    """As near as this architecture comes to `config`."""
    config, written = _normal(config), dict(architecture.expected)
    for field, key in architecture.config.items():
        value = getattr(config, field)
        written[key.name] = value if key.invert is None else key.invert(value)
    if architecture.slides is not None:
        written |= _write_windows(config, architecture)
    if architecture.nope_interval is not None:
        rotates = config.rope_layers or (True,) * config.num_layers
        written["no_rope_layers"] = list(map(int, rotates))
    if not config.learned_positions:
        written |= _write_rope(config, architecture)
        if architecture.local_rope_theta is not None:
            written["rope_local_base_freq"] = config.local_rope_theta
    return written


def _write_windows(config: DecoderConfig, architecture: Architecture) -> Fields:
    sizes = config.windows or (None,) * config.num_layers
    window = next(filter(None, sizes), None)
    rule = architecture.slides
    assert rule is not None
    # Where the rule is the same for all layers (Mistral), transformers knows no layer_types. No
    # architecture has more than five layers with a window in turn.
    if len({rule(layer, 1) for layer in range(6)}) == 1:
        use = {} if architecture.use_window else {"use_sliding_window": window is not None}
        return {"sliding_window": window, **use}
    kinds = {window: "sliding_attention", None: "full_attention"}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window or architecture.window,  # Gemma-2 asks for one in any case
        "layer_types": [kinds.get(size) for size in sizes],
    }


def _write_rope(config: DecoderConfig, architecture: Architecture) -> Fields:
    """Under the names that transformers had first, and still reads."""
    written: Fields = {"rope_theta": config.rope_theta}
    known, scaling = architecture.rope_options, config.rope_scaling
    if config.rotary_dim != config.head_dim and "partial_rotary_factor" in known:
        written["partial_rotary_factor"] = (config.rotary_dim or 0) / config.head_dim
    if scaling is not None and scaling.kind in known:
        written["rope_scaling"] = _write_scaling(scaling)
        if scaling.kind == "longrope":  # where Phi-3 looks first
            written["original_max_position_embeddings"] = scaling.original_length
        if scaling.kind in ("linear", "dynamic"):
            # The only place for the length before the scaling.
            written["max_position_embeddings"] = scaling.original_length
    return written


def _write_scaling(scaling: RopeScaling) -> Fields:
    written: Fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3", "longrope"):
        written["original_max_position_embeddings"] = scaling.original_length
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
        "longrope": ("attention_factor",),
    }.get(scaling.kind, ())
    values = {name: getattr(scaling, name) for name in names}
    if scaling.kind == "longrope":
        values |= {name: list(getattr(scaling, field)) for name, field in LONGROPE.items()}
    return written | {name: value for name, value in values.items() if value is not None}

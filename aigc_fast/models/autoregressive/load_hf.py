"""Models from Hugging Face folders, and from the state dicts of transformers' models."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigc_fast.io.hf_folder import HFFolder, read_hf_folder
from aigc_fast.models.state import Fetch, fetch_from

from .architectures import ARCHITECTURES, REQUIRED, Architecture, Fields
from .config import DecoderConfig
from .rope import RopeScaling
from .weights import assemble

if TYPE_CHECKING:
    from .decoder_lm import DecoderLM

Config = Mapping[str, Any]
_MISSING = object()
LONGROPE = {"short_factor": "divisors", "long_factor": "long_divisors"}
_STACKED = {
    "experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "experts.down_proj": ("ffn_down_exps",),
}
_LAYER_KINDS = {"sliding_attention", "full_attention"}
_TYPES = {field.name: str(field.type) for field in dataclass_fields(DecoderConfig)}


def read_hf_model(
    path: str | os.PathLike[str], build: Callable[[DecoderConfig], DecoderLM], dtype: torch.dtype
) -> tuple[DecoderLM, dict[str, Tensor]]:
    """An empty model of the config that a folder describes, and its state dict.

    Raises:
        ValueError: a file is unsound or needs something that `DecoderLM` does not do.
    """
    folder = read_hf_folder(path)
    kind = folder.config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"{folder.path}: model_type is {kind!r}; supported are {sorted(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    try:
        config = read_hf_config(folder.config, architecture, most_layers=len(folder.tensors))
    except ValueError as error:
        raise ValueError(f"{folder.path}: config.json: {error}") from None
    model = build(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.special_token_ids = {name: folder.config[name] for name in names if name in folder.config}
    prefix = _prefix(folder, architecture)
    unread = set(folder.tensors)

    def fetch(name: str, shape: tuple[int, ...]) -> Tensor:
        if name != "lm_head.weight":
            name = name.removeprefix(prefix)
        unread.discard(name)
        return folder.get_tensor(name, shape)

    state = _assemble(model, architecture, fetch, dtype)
    if config.tie_word_embeddings:
        unread.discard("lm_head.weight")
    unread = {name for name in unread if not name.endswith(architecture.ignored)}
    if unread:
        raise ValueError(f"{folder.path}: no use is known for tensor {min(unread)!r}")
    return model, state


def from_hf_state_dict(
    model: DecoderLM, state: Mapping[str, Tensor], architecture: str
) -> dict[str, Tensor]:
    """The state dict of a transformers model, renamed and fused for `model`.

    Raises:
        ValueError: a weight is missing, or has another shape than the model's config says.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {sorted(ARCHITECTURES)}, got {architecture!r}"
        )
    row = ARCHITECTURES[architecture]
    return _assemble(model, row, fetch_from(_as_in_files(state, row), "state"), None)


def _as_in_files(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The state dict of a model whose experts are in one tensor, as transformers writes it."""
    found = dict(state)
    for stacked, parts in _STACKED.items():
        for name in [name for name in found if name.endswith(stacked)]:
            layer = int(name.split(".")[-4])
            for e, weight in enumerate(found.pop(name).unbind()):
                for part, piece in zip(parts, weight.chunk(len(parts)), strict=True):
                    found[f"{architecture.names[part].format(layer, e)}.weight"] = piece
            router = found.pop(name.replace(stacked, "gate.weight"), None)
            if router is not None:
                found[f"{architecture.names['ffn_gate_inp'].format(layer)}.weight"] = router
    return found


def _assemble(
    model: DecoderLM,
    architecture: Architecture,
    fetch: Fetch,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    def fetch_part(part: str, layer: int | None, kind: str, shape: tuple[int, ...]) -> Tensor:
        flip = architecture.is_transposed(layer, shape)
        names = architecture.weight_names(part, layer, kind, model.config.num_experts)
        shape = (shape[0] // len(names), *shape[1:])
        weights = [fetch(name, shape[::-1] if flip else shape) for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if flip:
            weight = weight.t().contiguous()
        target = weight.dtype if dtype is None else dtype
        if architecture.offset_norms and part.endswith("norm"):
            # In fp32: where 1 + w is rounded to bfloat16 it must be rounded once.
            weight = weight.to(torch.promote_types(torch.float32, target)) + 1
        return weight.to(target)

    return assemble(model, architecture, fetch_part)


def _prefix(folder: HFFolder, architecture: Architecture) -> str:
    """What the names in this folder lack: a model saved without its head has no `model.`."""
    name = f"{architecture.names['token_embd']}.weight"
    prefix = name.split(".", 1)[0] + "."
    bare = name not in folder.tensors and name.removeprefix(prefix) in folder.tensors
    return prefix if bare else ""


def read_hf_config(config: Config, architecture: Architecture, most_layers: int) -> DecoderConfig:
    """The `DecoderConfig` that a config.json describes.

    Args:
        most_layers: bounds the work that a corrupt count can cause.

    Raises:
        ValueError: something is missing, unfit or not supported.
    """
    for name, value in {"quantization_config": None, **architecture.expected}.items():
        # What is off may be false, null or empty.
        if (found := config.get(name, value)) != value and (found or value):
            raise ValueError(f"{name} is {found!r}; only {value!r} is supported")
    fields: Fields = dict(architecture.fixed)
    for field, key in architecture.config.items():
        value = config.get(key.name, config.get(key.other_name or key.name, _MISSING))
        if value is _MISSING or (value is None and "None" not in _TYPES[field]):
            if key.default is REQUIRED:
                raise ValueError(f"{key.name!r} is missing")
            value = key.default(fields) if callable(key.default) else key.default
        if value is not None:
            value = _checked(key.name, value, _TYPES[field])
            if value is not True and value is not False and value <= 0:
                raise ValueError(f"{key.name!r} must be positive, got {value}")
            if key.convert is not None:
                value = key.convert(value)
        fields[field] = value
    if fields["num_layers"] > most_layers:
        raise ValueError(f"there are {fields['num_layers']} layers, but {most_layers} tensors")
    fields |= architecture.derive(fields)
    fields["windows"] = _windows(config, architecture, fields["num_layers"])
    if architecture.nope_interval is not None:
        fields["rope_layers"] = _rope_layers(config, architecture, fields["num_layers"])
    if not fields.get("learned_positions"):
        fields |= _rope_fields(config, architecture, fields)
    return DecoderConfig(**fields)


def _checked(name: str, value: object, kind: str) -> Any:
    """`value` if it is of that kind; a whole number is also a float."""
    wanted = kind.removesuffix(" | None")
    if wanted == "float" and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value).__name__ != wanted:
        raise ValueError(f"{name!r} must be of type {wanted}, got {type(value).__name__}")
    return value


def _windows(config: Config, architecture: Architecture, layers: int) -> tuple[int | None, ...]:
    if architecture.slides is None or not config.get("use_sliding_window", architecture.use_window):
        return ()
    window = config.get("sliding_window", architecture.window)
    if window is None:
        return ()
    window = _checked("sliding_window", window, "int")
    kinds = config.get("layer_types")
    if kinds is None:
        first = _checked("max_window_layers", config.get("max_window_layers", 28), "int")
        slides = [architecture.slides(layer, first) for layer in range(layers)]
    elif isinstance(kinds, list) and set(map(str, kinds)) <= _LAYER_KINDS:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        raise ValueError("'layer_types' must be a list of 'sliding_attention', 'full_attention'")
    return tuple(window if slide else None for slide in slides)


def _rope_layers(config: Config, architecture: Architecture, layers: int) -> tuple[bool, ...]:
    found = config.get("no_rope_layers")
    if found is None:
        interval = config.get("no_rope_layer_interval", architecture.nope_interval)
        return architecture.rope_layers(layers, _checked("no_rope_layer_interval", interval, "int"))
    if not isinstance(found, list) or not all(rotates in (0, 1) for rotates in found):
        raise ValueError(f"'no_rope_layers' must be a list of 0 and 1, got {found!r}")
    return tuple(map(bool, found))


def _rope_fields(config: Config, architecture: Architecture, fields: Fields) -> Fields:
    """The rotary fields; `rope_parameters` is what older files call rope_theta, rope_scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local_theta = architecture.local_rope_theta
    if local_theta is not None:
        rope, local_theta = _local_rope(config, rope, local_theta)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"'rope_parameters' must be an object of plain values, got {rope!r}")

    def get(name: str, default: Any, kind: str = "float") -> Any:
        value = rope.get(name)
        value = config.get(name) if value is None else value
        value = default if value is None else value
        return None if value is None else _checked(name, value, kind)

    length = fields["max_position_embeddings"]
    partial = get("partial_rotary_factor", 1.0)
    if not 0 < partial <= 1:
        raise ValueError(f"'partial_rotary_factor' must be in (0, 1], got {partial}")
    found: Fields = {
        "rope_theta": get("rope_theta", architecture.rope_theta),
        "local_rope_theta": local_theta,
        "rotary_dim": int(fields["head_dim"] * partial),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        if "longrope" in architecture.rope_options:  # whose older files say `su` or `yarn`
            kind = "longrope"
        found["rope_scaling"] = scaling = _rope_scaling(kind, rope, get, length)
        # But for Llama 3, files mostly give the length before the scaling.
        found["max_position_embeddings"] = max(length, scaling.reach)
    return found


def _rope_scaling(kind: Any, rope: Config, get: Callable[..., Any], length: int) -> RopeScaling:
    """The scaling of that kind; get(name, default, kind) reads and checks a parameter."""
    if kind not in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        raise ValueError(f"rope_type is {kind!r}, which is not supported")
    options: Fields = {"kind": kind, "factor": get("factor", None), "original_length": length}
    if kind == "longrope":
        options |= _longrope(rope, get, length)
    if options["factor"] is None:
        raise ValueError("rope_parameters: 'factor' is missing")
    if kind in ("yarn", "llama3"):
        options["original_length"] = get("original_max_position_embeddings", length, "int")
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            options[name] = get(name, None)
            if options[name] is None:
                raise ValueError(f"rope_parameters: {name!r} is missing")
    if kind == "yarn":
        options |= {
            "beta_fast": get("beta_fast", 32.0) or 32.0,
            "beta_slow": get("beta_slow", 1.0) or 1.0,
            "truncate": get("truncate", True, "bool"),
            "attention_factor": _yarn_attention_factor(get, options["factor"]),
        }
    return RopeScaling(**options)


def _local_rope(config: Config, rope: Any, default: float) -> tuple[Any, float]:
    """The parameters of the layers without a window, and rope_theta of those with one."""
    theta = config.get("rope_local_base_freq")
    if isinstance(rope, dict) and not rope.keys().isdisjoint(_LAYER_KINDS):
        local = rope.get("sliding_attention") or {}
        if not isinstance(local, dict) or local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters: 'sliding_attention' must be plain, got {local!r}")
        theta = local.get("rope_theta", theta)
        rope = rope.get("full_attention") or {}
    return rope, _checked("rope_local_base_freq", default if theta is None else theta, "float")


def _longrope(rope: Config, get: Callable[..., Any], length: int) -> Fields:
    original = get("original_max_position_embeddings", None, "int")
    if original is None or original < 1:
        raise ValueError(f"'original_max_position_embeddings' must be positive, got {original}")
    found: Fields = {
        "original_length": original,
        "factor": get("factor", length / original),
        "attention_factor": get("attention_factor", None),
    }
    for name, field in LONGROPE.items():
        divisors = rope.get(name)
        if not isinstance(divisors, list):
            raise ValueError(f"rope_parameters: {name!r} must be a list, got {divisors!r}")
        found[field] = tuple(_checked(name, value, "float") for value in divisors)
    return found


def _yarn_attention_factor(get: Callable[[str, Any], Any], factor: float) -> float | None:
    explicit = get("attention_factor", None)
    scale, all_dim = get("mscale", None), get("mscale_all_dim", None)
    if explicit is not None or not scale or not all_dim or not 1 < factor < math.inf:
        return explicit
    log = 0.1 * math.log(factor)
    return (scale * log + 1) / (all_dim * log + 1)

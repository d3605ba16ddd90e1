"""Models from GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aigc_fast.io.gguf import GGUFFile, GGUFTensor, read_gguf
from aigc_fast.io.quantized import GROUP_SIZE, pack_gguf
from aigc_fast.nn import Linear, QuantizedLinear

from .architectures import ARCHITECTURES, REQUIRED, Architecture, Key
from .config import DecoderConfig
from .rope import RopeScaling
from .weights import assemble, by_expert, is_of_experts, part_rows, parts_of

if TYPE_CHECKING:
    from .decoder_lm import DecoderLM

_INTEGERS = {"hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"} | {
    "intermediate_size",
    "max_position_embeddings",
    "num_experts",
    "experts_per_token",
}
_LONGROPE = {"divisors": "rope_factors_short.weight", "long_divisors": "rope_factors_long.weight"}


def read_gguf_model(
    path: str | os.PathLike[str],
    build: Callable[[DecoderConfig], DecoderLM],
    dtype: torch.dtype,
    packed: bool,
) -> tuple[DecoderLM, dict[str, Tensor]]:
    """An empty model of the config that a GGUF file describes, and its state dict.

    packed: matrices stay codes, those of the model are then there already.

    Raises:
        ValueError: the file is unsound or needs something that `DecoderLM` does not do.
    """
    file = read_gguf(path)
    name = file.get("general.architecture", str)
    known = {row.gguf_name or kind: row for kind, row in ARCHITECTURES.items()}
    if name not in known:
        raise ValueError(
            f"{file.path}: general.architecture is {name!r}; supported are {sorted(known)}"
        )
    architecture = known[name]
    config = _read_config(file, name, architecture)
    unread = set(file.tensors) - {"rope_freqs.weight"}
    if _has_longrope(file):
        unread -= set(_LONGROPE.values())

    def find(part: str, layer: int | None, kind: str, shape: tuple[int, ...]) -> GGUFTensor:
        name = f"{part}.{kind}" if layer is None else f"blk.{layer}.{part}.{kind}"
        if is_of_experts(part):
            experts = config.num_experts or 1
            tensor = file.get_tensor(name, (experts, shape[0] // experts, *shape[1:])).matrix()
        else:
            tensor = file.get_tensor(name, shape)
        unread.discard(name)
        return tensor

    def fetch(part: str, layer: int | None, kind: str, shape: tuple[int, ...]) -> Tensor:
        weight = find(part, layer, kind, shape).dequantize()
        if architecture.paired_rotary and part in ("attn_q", "attn_k"):
            weight = _halves_from_pairs(weight, config.head_dim)
        return weight.to(dtype)

    def pack(module: str, linear: nn.Linear) -> QuantizedLinear | None:
        layer, parts = parts_of(module, architecture, config)
        if module == "lm_head" and config.tie_word_embeddings:
            parts = ("token_embd",)
        rows = part_rows(config, parts, linear.out_features)
        if is_of_experts(parts[0]) and linear.out_features // (config.num_experts or 1) % 16:
            return None  # the experts would share tiles
        tensors = [
            find(part, layer, "weight", (count, linear.in_features))
            for part, count in zip(parts, rows, strict=True)
        ]
        order = None
        if is_of_experts(parts[0]):
            order = torch.cat(
                by_expert(torch.arange(linear.out_features).split(rows), parts, config)
            )
        if architecture.paired_rotary and "attn_q" in parts:
            order = torch.arange(linear.out_features)
            turned = sum(rows[:2])
            order[:turned] = _halves_from_pairs(order[:turned], config.head_dim)
        weight = pack_gguf(tensors, order)
        return None if weight is None else QuantizedLinear.from_packed(linear, *weight, GROUP_SIZE)

    model = build(config)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            model.special_token_ids[f"{name}_token_id"] = token
    if packed:
        _replace_linears(model, pack)
    state = assemble(model, architecture, fetch)
    if unread:
        raise ValueError(f"{file.path}: no use is known for tensor {min(unread)!r}")
    return model, state


def _replace_linears(
    model: DecoderLM, pack: Callable[[str, nn.Linear], QuantizedLinear | None]
) -> None:
    config = model.config
    if model.lm_head is None:
        # The embedding is gathered from dense rows, and multiplied as codes.
        model.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and (replacement := pack(name, linear)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    if isinstance(model.lm_head, nn.Linear) and config.tie_word_embeddings:
        model.lm_head = None


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Puts the rows of each head back where transformers has them.

    For this architecture llama.cpp rotates neighbours (2i, 2i + 1) and its converter moved the
    rows to suit; here the halves (i, i + head_dim / 2) rotate, which loads whole vectors.
    """
    pairs = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _read_config(file: GGUFFile, name: str, architecture: Architecture) -> DecoderConfig:
    fields: dict[str, Any] = dict(architecture.fixed)
    for field, key in architecture.metadata.items():
        fields[field] = _read(file, name, key, int if field in _INTEGERS else float, fields)
    # Every layer has tensors, so this bounds the work that a corrupt count can cause.
    if fields["num_layers"] > len(file.tensors):
        raise ValueError(
            f"{file.path}: {name}.block_count is {fields['num_layers']} "
            f"with {len(file.tensors)} tensors"
        )
    if f"{name}.vocab_size" in file.metadata:
        fields["vocab_size"] = file.get(f"{name}.vocab_size", int)
    else:
        fields["vocab_size"] = len(file.get("tokenizer.ggml.tokens", list))
    fields |= _read_presence(file)
    for field in ("num_experts", "experts_per_token"):
        fields[field] = fields.get(field) or None  # 0 says that there are none
    fields["rope_layers"] = architecture.rope_layers(fields["num_layers"])
    fields |= architecture.derive(fields)
    fields["windows"] = _read_windows(file, name, architecture, fields)
    fields["rotary_dim"] = _read_rotary_dim(file, name, architecture, fields)
    scaling = _read_scaling(file, name, fields["max_position_embeddings"])
    if scaling is not None:
        fields["max_position_embeddings"] = max(fields["max_position_embeddings"], scaling.reach)
    try:
        return DecoderConfig(**fields, rope_scaling=scaling)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _read(file: GGUFFile, name: str, key: Key, kind: type, fields: dict[str, Any]) -> Any:
    """The value of a key, or the default that goes by the fields read before it."""
    full_name = f"{name}.{key.name}"
    if key.default is REQUIRED or full_name in file.metadata:
        return file.get(full_name, kind)
    return key.default(fields) if callable(key.default) else key.default


def _read_presence(file: GGUFFile) -> dict[str, bool]:
    """What the tensors themselves tell by being there or not."""
    return {
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "qkv_bias": not {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}.isdisjoint(file.tensors),
        "output_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _read_windows(
    file: GGUFFile, name: str, architecture: Architecture, fields: dict[str, Any]
) -> tuple[int | None, ...]:
    window = _read(file, name, Key("attention.sliding_window", architecture.window), int, fields)
    # Mistral goes by the name of Llama, and its window is on all layers.
    slides = ARCHITECTURES["mistral"].slides if name == "llama" else architecture.slides
    # Qwen's converter writes no window, and llama.cpp gives it none.
    if not window or slides is None or not architecture.use_window:
        return ()
    return tuple(window if slides(layer, 0) else None for layer in range(fields["num_layers"]))


def _read_rotary_dim(
    file: GGUFFile, name: str, architecture: Architecture, fields: dict[str, Any]
) -> int:
    head_dim = fields["head_dim"]
    rotary_dim = _read(file, name, Key("rope.dimension_count", head_dim), int, fields)
    if architecture.paired_rotary and rotary_dim != head_dim:
        raise ValueError(
            f"{file.path}: {name}.rope.dimension_count must be the head size "
            f"{head_dim}, got {rotary_dim}"
        )
    return rotary_dim


def _has_longrope(file: GGUFFile) -> bool:
    return all(name in file.tensors for name in _LONGROPE.values())


def _numbers(file: GGUFFile, name: str) -> tuple[float, ...]:
    return tuple(file.tensors[name].dequantize().flatten().tolist())


def _read_scaling(file: GGUFFile, name: str, length: int) -> RopeScaling | None:
    scale, kind = f"{name}.rope.scale_linear", f"{name}.rope.scaling.type"
    options: dict[str, Any] = {"original_length": length}
    if "rope_freqs.weight" in file.tensors:  # what llama.cpp's converter makes of `llama3`
        options |= {"kind": "divisors", "divisors": _numbers(file, "rope_freqs.weight")}
    elif _has_longrope(file):
        options["kind"] = "longrope"
        options["original_length"] = file.get(f"{name}.rope.scaling.original_context_length", int)
        options["attention_factor"] = file.get(f"{name}.rope.scaling.attn_factor", float)
        options |= {key: _numbers(file, tensor) for key, tensor in _LONGROPE.items()}
    elif scale in file.metadata:
        options |= {"kind": "linear", "factor": file.get(scale, float)}
    elif file.metadata.get(kind, "none") == "none":
        return None
    else:
        options["kind"] = file.get(kind, str)
        if options["kind"] not in ("linear", "yarn"):
            raise ValueError(f"{file.path}: {kind} is {options['kind']!r}, which is not supported")
        options["factor"] = file.get(f"{name}.rope.scaling.factor", float)
        original = f"{name}.rope.scaling.original_context_length"
        if original in file.metadata:
            options["original_length"] = file.get(original, int)
        for end in ("attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
            if f"{name}.rope.scaling.{end}" in file.metadata:
                raise ValueError(f"{file.path}: {name}.rope.scaling.{end} is not supported")
        for field in ("beta_fast", "beta_slow"):
            if (key := f"{name}.rope.scaling.yarn_{field}") in file.metadata:
                options[field] = file.get(key, float)
    try:
        return RopeScaling(**options)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None

"""Weights from elsewhere, brought into the layout of `DecoderLM`.

    transformers (model.layers.N.)   GGUF (blk.N.)     here (layers.N.)
    input_layernorm                  attn_norm         attention_norm
    self_attn.{q,k,v}_proj           attn_{q,k,v}      attention.qkv_proj
    self_attn.o_proj                 attn_output       attention.o_proj
    post_attention_layernorm         ffn_norm          mlp_norm
    mlp.{gate,up}_proj               ffn_{gate,up}     mlp.gate_up_proj
    mlp.down_proj                    ffn_down          mlp.down_proj

Outside the layers: model.embed_tokens, model.norm, lm_head; token_embd, output_norm, output;
embed_tokens, norm, lm_head. Fused weights hold the rows of their parts one after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from aigc_fast.io.gguf import GGUFFile, read_gguf

from .config import DecoderConfig

T = TypeVar("T")

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = {
    "attention_norm": ("attn_norm",),
    "attention.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "attention.o_proj": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}


def from_hf_state_dict(config: DecoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a transformers `LlamaForCausalLM`, renamed and fused.

    Raises:
        ValueError: a weight is missing, or has another shape than `config` says.
    """

    def fetch(part: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        prefix = "" if layer is None else f"model.layers.{layer}."
        name = f"{prefix}{_HF_NAMES[part]}.weight"
        if name not in state:
            raise ValueError(f"state: {name!r} is missing")
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"state: {name!r} must have shape {shape}, got {tuple(state[name].shape)}"
            )
        return state[name].detach()

    return _assemble(config, fetch)


def read_gguf_weights(
    path: str | os.PathLike[str], dtype: torch.dtype
) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The config and the state dict of a GGUF file of architecture `llama`.

    Raises:
        ValueError: the file is unsound or needs something that `DecoderLM` does not do.
    """
    file = read_gguf(path)
    config = _gguf_config(file)
    unread = set(file.tensors)

    def fetch(part: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        name = f"{part}.weight" if layer is None else f"blk.{layer}.{part}.weight"
        weight = file.get_tensor(name, shape).dequantize()
        unread.discard(name)
        if part in ("attn_q", "attn_k"):
            weight = _halves_from_pairs(weight, config.head_dim)
        return weight.to(dtype)

    state = _assemble(config, fetch)
    if unread:
        raise ValueError(f"{file.path}: no use is known for tensor {min(unread)!r}")
    return config, state


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Puts the rows of each head back where transformers has them.

    llama.cpp rotates neighbours (2i, 2i + 1) and its converter moved the rows to suit; here
    the halves (i, i + head_dim / 2) rotate, which loads whole vectors.
    """
    rows, columns = weight.shape
    pairs = weight.view(-1, head_dim // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _assemble(
    config: DecoderConfig, fetch: Callable[[str, int | None, tuple[int, ...]], Tensor]
) -> dict[str, Tensor]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    shapes = {
        "attn_norm": (hidden,),
        "attn_q": (query_rows, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, query_rows),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    state = {
        "embed_tokens.weight": fetch("token_embd", None, (config.vocab_size, hidden)),
        "norm.weight": fetch("output_norm", None, (hidden,)),
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = fetch("output", None, (config.vocab_size, hidden))
    for layer in range(config.num_layers):
        for name, parts in _LAYER.items():
            weights = [fetch(part, layer, shapes[part]) for part in parts]
            state[f"layers.{layer}.{name}.weight"] = (
                torch.cat(weights) if len(weights) > 1 else weights[0]
            )
    return state


def _gguf_config(file: GGUFFile) -> DecoderConfig:
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise ValueError(
            f"{file.path}: general.architecture is {architecture!r}; only 'llama' is supported"
        )
    for key in ("rope.scaling.type", "rope.scale_linear", "attention.sliding_window"):
        if file.metadata.get(f"llama.{key}", "none") != "none":
            raise ValueError(f"{file.path}: llama.{key} is not supported")

    def get(key: str, kind: type[T], default: T | None = None) -> T:
        key = f"llama.{key}"
        if default is not None and key not in file.metadata:
            return default
        return file.get(key, kind)

    num_layers = get("block_count", int)
    # Every layer has tensors, so this bounds the work that a corrupt count can cause.
    if num_layers > len(file.tensors):
        raise ValueError(
            f"{file.path}: llama.block_count is {num_layers} with {len(file.tensors)} tensors"
        )
    if "llama.vocab_size" in file.metadata:
        vocab_size = get("vocab_size", int)
    else:
        vocab_size = len(file.get("tokenizer.ggml.tokens", list))
    num_heads = get("attention.head_count", int)
    hidden_size = get("embedding_length", int)
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", int, num_heads),
        head_dim=get("attention.key_length", int, hidden_size // max(num_heads, 1)),
        intermediate_size=get("feed_forward_length", int),
        max_position_embeddings=get("context_length", int),
    )
    rope_theta = get("rope.freq_base", float, 10000.0)
    rms_norm_eps = get("attention.layer_norm_rms_epsilon", float)
    tied = "output.weight" not in file.tensors
    try:
        config = DecoderConfig(
            **sizes, rope_theta=rope_theta, rms_norm_eps=rms_norm_eps, tie_word_embeddings=tied
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    if (rotary_dim := get("rope.dimension_count", int, config.head_dim)) != config.head_dim:
        raise ValueError(
            f"{file.path}: llama.rope.dimension_count must be the head size "
            f"{config.head_dim}, got {rotary_dim}"
        )
    return config

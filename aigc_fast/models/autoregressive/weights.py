"""Weights of a file, brought into the layout of `DecoderLM`, and out of it.

    llama.cpp                here
    token_embd               embed_tokens
    position_embd            embed_positions
    output_norm, output      norm, lm_head
    blk.N.attn_norm          layers.N.attention_norm
    blk.N.attn_{q,k,v}       layers.N.attention.qkv_proj     (GPT-2, Phi-3: attn_qkv)
    blk.N.attn_{q,k}_norm    layers.N.attention.{query,key}_norm
    blk.N.attn_output        layers.N.attention.o_proj
    blk.N.post_attention_norm        .post_attention_norm
    blk.N.ffn_norm                   .mlp_norm
    blk.N.ffn_{gate,up}              .mlp.gate_up_proj       (Phi-3: ffn_up)
    blk.N.ffn_up                     .mlp.up_proj            (without a gate)
    blk.N.ffn_down                   .mlp.down_proj
    blk.N.ffn_gate_inp               .mlp.router
    blk.N.ffn_{gate,up}_exps         .mlp.gate_up_proj
    blk.N.ffn_down_exps              .mlp.down_proj
    blk.N.post_ffw_norm              .post_mlp_norm

Fused weights hold the rows of their parts one after another; those of experts, expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .architectures import Architecture
from .config import DecoderConfig

if TYPE_CHECKING:
    from .decoder_lm import DecoderLM

# Gives a weight: its name, with `{}` for the layer where it is in one; the layer; `weight` or
# `bias`; and the shape it must have.
Fetch = Callable[[str, int | None, str, tuple[int, ...]], Tensor]

_EXPERT_PARTS = {
    "mlp.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.down_proj": ("ffn_down_exps",),
}
_PARTS = {
    "embed_tokens": ("token_embd",),
    "embed_positions": ("position_embd",),
    "norm": ("output_norm",),
    "lm_head": ("output",),
    "attention_norm": ("attn_norm",),
    "attention.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "attention.query_norm": ("attn_q_norm",),
    "attention.key_norm": ("attn_k_norm",),
    "attention.o_proj": ("attn_output",),
    "post_attention_norm": ("post_attention_norm",),
    "mlp_norm": ("ffn_norm",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.router": ("ffn_gate_inp",),
    "post_mlp_norm": ("post_ffw_norm",),
}


def assemble(model: DecoderLM, architecture: Architecture, fetch: Fetch) -> dict[str, Tensor]:
    """The state dict of `model`, whose own tensors only say the shapes; packed weights stay."""
    state = {}
    for key, like in model.state_dict().items():
        if like.dtype == torch.uint8:
            state[key] = like
            continue
        module, _, kind = key.rpartition(".")
        layer, parts = parts_of(module, architecture, model.config)
        rows = part_rows(model.config, parts, like.shape[0])
        weights = [
            fetch(part, layer, kind, (count, *like.shape[1:]))
            for part, count in zip(parts, rows, strict=True)
        ]
        weights = by_expert(weights, parts, model.config)
        state[key] = torch.cat(weights) if len(weights) > 1 else weights[0]
    return state


def by_expert(
    weights: Sequence[Tensor], parts: tuple[str, ...], config: DecoderConfig
) -> list[Tensor]:
    """What stands one below the other of the weights of `parts`."""
    if len(parts) == 1 or not is_of_experts(parts[0]):
        return list(weights)
    of_experts = (weight.chunk(config.num_experts or 1) for weight in weights)
    return [weight for pair in zip(*of_experts, strict=True) for weight in pair]


def is_of_experts(part: str) -> bool:
    """Whether it holds the rows of all experts of a layer."""
    return part.endswith("_exps")


def disassemble(
    state: Mapping[str, Tensor], config: DecoderConfig, architecture: Architecture
) -> Iterator[tuple[str, int | None, str, Tensor]]:
    """The inverse: part, layer, `weight` or `bias`, and the weight, of every part."""
    for key, weight in state.items():
        module, _, kind = key.rpartition(".")
        layer, parts = parts_of(module, architecture, config)
        rows = part_rows(config, parts, weight.shape[0])
        if is_of_experts(parts[0]):
            runs = weight.chunk(len(parts) * (config.num_experts or 1))
            pieces = [torch.cat(runs[i :: len(parts)]) for i in range(len(parts))]
        else:
            pieces = weight.split(rows)
        for part, piece in zip(parts, pieces, strict=True):
            yield part, layer, kind, piece


def parts_of(
    module: str, architecture: Architecture, config: DecoderConfig
) -> tuple[int | None, tuple[str, ...]]:
    """The layer that a module of `DecoderLM` is in, or None, and the parts of its weight."""
    layer = None
    if module.startswith("layers."):
        _, number, module = module.split(".", 2)
        layer = int(number)
    if config.num_experts is not None and module in _EXPERT_PARTS:
        return layer, _EXPERT_PARTS[module]
    if module == "attention.qkv_proj" and "attn_qkv" in architecture.names:
        return layer, ("attn_qkv",)
    if module == "mlp.gate_up_proj" and "ffn_gate" not in architecture.names:
        return layer, ("ffn_up",)
    return layer, _PARTS[module]


def part_rows(config: DecoderConfig, parts: tuple[str, ...], rows: int) -> list[int]:
    if parts[0] == "attn_q":
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return [count * config.head_dim for count in heads]
    return [rows // len(parts)] * len(parts)

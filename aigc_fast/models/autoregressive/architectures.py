"""The table of architectures: a new one is a new row.

A row says which of `DecoderConfig`'s fields stand under which key of config.json and of a GGUF
file's metadata, and what transformers calls the weights. Weights go by llama.cpp's names here:
they are the same for all architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

Fields = dict[str, Any]
REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """Where a field of `DecoderConfig` stands in a file.

    Attributes:
        name: of the entry.
        other_name: which it may have too.
        default: the value where it is absent, or a function of the fields read before it.
        convert: makes the field of the entry.
        invert: makes the entry of the field, where `convert` is not None.
    """

    name: str
    default: Any = REQUIRED
    convert: Callable[[Any], Any] | None = None
    invert: Callable[[Any], Any] | None = None
    other_name: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        names: llama.cpp's name of a weight -> transformers' name; `{}` is the layer, and then the
            expert: llama.cpp has those of all experts in one.
        config: field of `DecoderConfig` -> its key in config.json.
        metadata: field -> its key in GGUF's metadata, after the name of the architecture.
        fixed: fields that are the same in every model of the kind.
        derive: fields that follow from those read.
        expected: keys of config.json that must have that value, where they are there.
        slides: whether a layer has the sliding window, of its number and config.json's
            max_window_layers; `layer_types` goes before it. None: there are no windows.
        window, use_window: the defaults of config.json's sliding_window, use_sliding_window.
        rope_theta, local_rope_theta: the defaults of its rope_theta, rope_local_base_freq; a local
            one of None: layers with a window rotate as the others do.
        rope_options: what transformers' model of the kind does beside the plain rotation: kinds of
            scaling, and `partial_rotary_factor`.
        nope_interval: one layer in so many does not rotate, where config.json's no_rope_layers and
            no_rope_layer_interval do not say; None: all rotate.
        transposed: transformers stores the matrices of the layers as (in, out).
        offset_norms: transformers stores the weights of the norms less one.
        paired_rotary: llama.cpp rotates neighbours, and its converter permutes query and key.
        ignored: ends of the names of tensors in old files that hold no weight.
        model_class: of transformers, by which other programs know the kind.
        gguf_name: general.architecture of a GGUF file, where it is not transformers' model_type.
    """

    names: Mapping[str, str]
    config: Mapping[str, Key]
    metadata: Mapping[str, Key]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[Fields], Fields] = lambda fields: {}
    expected: Mapping[str, Any] = field(default_factory=dict)
    slides: Callable[[int, int], bool] | None = None
    window: int | None = None
    use_window: bool = True
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None
    rope_options: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3")
    nope_interval: int | None = None
    transposed: bool = False
    offset_norms: bool = False
    paired_rotary: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    model_class: str = "LlamaForCausalLM"
    gguf_name: str | None = None

    def weight_names(
        self, part: str, layer: int | None, kind: str, experts: int | None
    ) -> list[str]:
        """transformers' names of the `weight` or `bias` of a part, which llama.cpp names: that of
        each expert, or the one."""
        name = self.names[part]
        numbers = range(experts or 0) if name.count("{}") == 2 else (None,)
        return [f"{name.format(layer, number)}.{kind}" for number in numbers]

    def rope_layers(self, layers: int, interval: int | None = None) -> tuple[bool, ...]:
        """The field of that name where a file does not list the layers."""
        interval = interval or self.nope_interval
        return tuple((i + 1) % interval != 0 for i in range(layers)) if interval else ()

    def is_transposed(self, layer: int | None, shape: tuple[int, ...]) -> bool:
        """Whether transformers stores the transpose of a weight of that shape."""
        return self.transposed and layer is not None and len(shape) == 2


def _head_dim(fields: Fields) -> int:
    return fields["hidden_size"] // max(fields["num_heads"], 1)


def _num_heads(fields: Fields) -> int:
    return fields["num_heads"]


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
    "ffn_gate_inp": "model.layers.{}.mlp.gate",
    "ffn_gate_exps": "model.layers.{}.mlp.experts.{}.gate_proj",
    "ffn_up_exps": "model.layers.{}.mlp.experts.{}.up_proj",
    "ffn_down_exps": "model.layers.{}.mlp.experts.{}.down_proj",
}
_MIXTRAL_NAMES = _LLAMA_NAMES | {
    "ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
    "ffn_gate_exps": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
# Without a part of the gate its rows stand before those of ffn_up.
_PHI3_NAMES = {part: name for part, name in _LLAMA_NAMES.items() if part != "ffn_gate"} | {
    "attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "ffn_up": "model.layers.{}.mlp.gate_up_proj",
}
_OLMO2_NAMES = _LLAMA_NAMES | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GEMMA2_NAMES = _OLMO2_NAMES | {"ffn_norm": "model.layers.{}.pre_feedforward_layernorm"}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}

_LLAMA_CONFIG = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", _num_heads),
    "head_dim": Key("head_dim", _head_dim),
    "intermediate_size": Key("intermediate_size"),
    "max_position_embeddings": Key("max_position_embeddings"),
    "rms_norm_eps": Key("rms_norm_eps", 1e-6),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
}
_PHI3_CONFIG = {name: key for name, key in _LLAMA_CONFIG.items() if name != "head_dim"} | {
    "rms_norm_eps": Key("rms_norm_eps", 1e-5)
}
_EXPERTS = {
    "num_experts": Key("num_experts", other_name="num_local_experts"),
    "experts_per_token": Key("num_experts_per_tok"),
    "normalize_experts": Key("norm_topk_prob", False),
}
_BIAS = {
    "qkv_bias": Key("attention_bias", False),
    "output_bias": Key("attention_bias", False),
}
_GEMMA2_CONFIG = _BIAS | {
    "head_dim": Key("head_dim", 256),
    "tie_word_embeddings": Key("tie_word_embeddings", True),
    "attention_scale": Key(
        "query_pre_attn_scalar", 256, lambda dim: dim**-0.5, lambda scale: round(scale**-2)
    ),
    "attention_softcap": Key("attn_logit_softcapping", 50.0),
    "logit_softcap": Key("final_logit_softcapping", 30.0),
}
_GEMMA3_CONFIG = _GEMMA2_CONFIG | {"logit_softcap": Key("final_logit_softcapping", None)}
del _GEMMA3_CONFIG["attention_softcap"]  # transformers has the key and no softcap
_GRANITE_CONFIG = {
    "attention_scale": Key("attention_multiplier", 1.0),
    "logits_scaling": Key("logits_scaling", 1.0),
    "embedding_scale": Key("embedding_multiplier", 1.0),
    "residual_scale": Key("residual_multiplier", 1.0),
}
_GPT2_CONFIG = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("n_embd"),
    "num_layers": Key("n_layer"),
    "num_heads": Key("n_head"),
    "intermediate_size": Key("n_inner", lambda fields: 4 * fields["hidden_size"]),
    "max_position_embeddings": Key("n_positions"),
    "rms_norm_eps": Key("layer_norm_epsilon", 1e-5),
    "tie_word_embeddings": Key("tie_word_embeddings", True),
}

_GGUF_SIZES = {
    "hidden_size": Key("embedding_length"),
    "num_layers": Key("block_count"),
    "num_heads": Key("attention.head_count"),
    "num_kv_heads": Key("attention.head_count_kv", _num_heads),
    "head_dim": Key("attention.key_length", _head_dim),
    "intermediate_size": Key("feed_forward_length"),
    "max_position_embeddings": Key("context_length"),
}
_GGUF_LLAMA = _GGUF_SIZES | {
    "rms_norm_eps": Key("attention.layer_norm_rms_epsilon"),
    "rope_theta": Key("rope.freq_base", 10000.0),
}
_GGUF_EXPERTS = {
    "num_experts": Key("expert_count"),
    "experts_per_token": Key("expert_used_count"),
}
_GGUF_GRANITE = _GGUF_LLAMA | {
    "attention_scale": Key("attention.scale", None),
    "logits_scaling": Key("logit_scale", 1.0),
    "embedding_scale": Key("embedding_scale", 1.0),
    "residual_scale": Key("residual_scale", 1.0),
}
_GGUF_GEMMA2 = _GGUF_LLAMA | {
    "attention_softcap": Key("attn_logit_softcapping", 50.0),
    "logit_softcap": Key("final_logit_softcapping", 30.0),
}
_GGUF_GEMMA3 = _GGUF_LLAMA | {
    "rope_theta": Key("rope.freq_base", 1e6),
    "local_rope_theta": Key("rope.freq_base_swa", 10000.0),
    "logit_softcap": Key("final_logit_softcapping", None),
}
_GGUF_GPT2 = _GGUF_SIZES | {"rms_norm_eps": Key("attention.layer_norm_epsilon")}


def _gemma_derived(layers_of_27b: int, fields: Fields) -> Fields:
    derived: Fields = {"embedding_scale": math.sqrt(fields["hidden_size"])}
    # GGUF does not say so: of the sizes the largest, 27B, has another scale.
    if "attention_scale" not in fields and fields["num_layers"] == layers_of_27b:
        derived["attention_scale"] = _head_dim(fields) ** -0.5
    return derived


def _gpt2_derived(fields: Fields) -> Fields:
    return {"num_kv_heads": fields["num_heads"], "head_dim": _head_dim(fields)}


_LLAMA = Architecture(
    names=_LLAMA_NAMES,
    config=_LLAMA_CONFIG | _BIAS | {"mlp_bias": Key("mlp_bias", False)},
    metadata=_GGUF_LLAMA
    | {  # Mixtral goes by this name
        field: replace(key, default=None) for field, key in _GGUF_EXPERTS.items()
    },
    expected={"hidden_act": "silu"},
    paired_rotary=True,
)
_QWEN2 = replace(
    _LLAMA,
    config=_LLAMA_CONFIG,
    fixed={"qkv_bias": True},
    slides=lambda layer, first: layer >= first,
    window=4096,
    use_window=False,
    paired_rotary=False,
    model_class="Qwen2ForCausalLM",
)
_GEMMA2 = Architecture(
    names=_GEMMA2_NAMES,
    config=_LLAMA_CONFIG | _GEMMA2_CONFIG,
    metadata=_GGUF_GEMMA2,
    fixed={"activation": "geglu_tanh", "post_norms": True},
    derive=partial(_gemma_derived, 46),
    expected={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": None},
    slides=lambda layer, first: layer % 2 == 0,
    window=4096,
    offset_norms=True,
    model_class="Gemma2ForCausalLM",
)

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": replace(
        _LLAMA,
        config=_LLAMA_CONFIG,
        slides=lambda layer, first: True,
        window=4096,
        model_class="MistralForCausalLM",
    ),
    "mixtral": replace(
        _LLAMA,
        names=_MIXTRAL_NAMES,
        config=_LLAMA_CONFIG
        | {
            "rms_norm_eps": Key("rms_norm_eps", 1e-5),
            "num_experts": Key("num_local_experts", 8),
            "experts_per_token": Key("num_experts_per_tok", 2),
        },
        expected={"hidden_act": "silu", "router_jitter_noise": 0.0},
        slides=lambda layer, first: True,
        rope_theta=1e6,
        model_class="MixtralForCausalLM",
    ),
    "qwen2": _QWEN2,
    "qwen3": replace(
        _QWEN2,
        config=_LLAMA_CONFIG | _BIAS | {"head_dim": Key("head_dim", 128)},
        fixed={"qk_norm": True},
        model_class="Qwen3ForCausalLM",
    ),
    "qwen3_moe": replace(
        _QWEN2,
        config=_LLAMA_CONFIG
        | _BIAS
        | _EXPERTS
        | {"intermediate_size": Key("moe_intermediate_size", 768)},
        metadata=_GGUF_LLAMA
        | _GGUF_EXPERTS
        | {"intermediate_size": Key("expert_feed_forward_length")},
        fixed={"qk_norm": True},
        expected={**_QWEN2.expected, "decoder_sparse_step": 1, "mlp_only_layers": []},
        slides=lambda layer, first: True,
        model_class="Qwen3MoeForCausalLM",
        gguf_name="qwen3moe",
    ),
    "olmoe": replace(
        _QWEN2,
        config=_LLAMA_CONFIG | _BIAS | _EXPERTS | {"rms_norm_eps": Key("rms_norm_eps", 1e-5)},
        metadata=_GGUF_LLAMA | _GGUF_EXPERTS,
        fixed={"qk_norm": True, "joint_qk_norm": True, "normalize_experts": False},
        expected={**_QWEN2.expected, "clip_qkv": None},
        slides=None,
        model_class="OlmoeForCausalLM",
    ),
    "phi3": Architecture(
        names=_PHI3_NAMES,
        config=_PHI3_CONFIG,
        metadata=_GGUF_LLAMA,
        derive=lambda fields: {"head_dim": _head_dim(fields)},
        expected={"hidden_act": "silu"},
        slides=lambda layer, first: True,
        rope_options=("longrope", "partial_rotary_factor"),
        model_class="Phi3ForCausalLM",
    ),
    "smollm3": replace(
        _LLAMA,
        config={**_LLAMA.config, "tie_word_embeddings": Key("tie_word_embeddings", True)},
        expected={**_LLAMA.expected, "use_sliding_window": False},
        rope_theta=2e6,
        nope_interval=4,
        model_class="SmolLM3ForCausalLM",
    ),
    "granite": replace(
        _LLAMA,
        config={**_LLAMA.config, **_GRANITE_CONFIG},
        metadata=_GGUF_GRANITE,
        model_class="GraniteForCausalLM",
    ),
    "olmo2": replace(
        _LLAMA,
        names=_OLMO2_NAMES,
        config=_LLAMA_CONFIG | _BIAS | {"rms_norm_eps": Key("rms_norm_eps", 1e-5)},
        fixed={"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True},
        paired_rotary=False,
        model_class="Olmo2ForCausalLM",
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        config=_LLAMA_CONFIG | _GEMMA3_CONFIG,
        metadata=_GGUF_GEMMA3,
        fixed={**_GEMMA2.fixed, "qk_norm": True},
        derive=partial(_gemma_derived, 62),
        expected={**_GEMMA2.expected, "sliding_window_pattern": 6},
        slides=lambda layer, first: (layer + 1) % 6 != 0,
        rope_theta=1e6,
        local_rope_theta=10000.0,
        model_class="Gemma3ForCausalLM",
        gguf_name="gemma3",
    ),
    "gpt2": Architecture(
        names=_GPT2_NAMES,
        config=_GPT2_CONFIG,
        metadata=_GGUF_GPT2,
        fixed={
            "norm": "layer",
            "activation": "gelu_tanh",
            "learned_positions": True,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        derive=_gpt2_derived,
        expected={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        transposed=True,
        ignored=("attn.bias", "attn.masked_bias"),
        model_class="GPT2LMHeadModel",
    ),
    "stablelm": Architecture(
        names=_LLAMA_NAMES,
        config=_LLAMA_CONFIG
        | {
            "rms_norm_eps": Key("layer_norm_eps", 1e-5),
            "qkv_bias": Key("use_qkv_bias", False),
        },
        metadata=_GGUF_LLAMA | {"rms_norm_eps": Key("attention.layer_norm_epsilon")},
        fixed={"norm": "layer"},
        rope_options=("linear", "dynamic", "yarn", "llama3", "partial_rotary_factor"),
        expected={
            "hidden_act": "silu",
            "qk_layernorm": False,
            "use_parallel_residual": False,
        },
        model_class="StableLmForCausalLM",
    ),
}

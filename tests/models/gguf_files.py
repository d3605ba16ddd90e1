"""GGUF files as llama.cpp's converter (convert_hf_to_gguf.py) writes them."""

import math

import torch

from tests.models.checkpoints import OFFSET_NORMS

_NAMES = {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"
}  # fmt: skip
# Of these the converter changes weights, beside their names.
_PERMUTED = ("llama", "mistral", "mixtral", "smollm3", "granite")
# Parts of experts: in one tensor of transformers, each of its own in a file.
_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


def write_gguf(path, hf, storage=None, **changes):
    """Writes transformers' model `hf`; `storage` is ggml's type of the matrices."""
    import gguf

    config, kind = hf.config, hf.config.model_type
    arch = _NAMES.get(kind, kind)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model("none")  # else llama.cpp asks for one
    for key, value in (_metadata(config) | changes).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    members = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(members[arch], config.num_hidden_layers)
    for name, weight in _converted(hf):
        values = weight.detach().float().contiguous().numpy()
        if not name.startswith("blk."):
            name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if storage is None or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, storage), raw_dtype=storage)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        for which in ("long", "short"):
            factors = torch.tensor(rope[f"{which}_factor"])
            writer.add_tensor(f"rope_factors_{which}.weight", factors.numpy())
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config):
    kind, heads = config.model_type, config.num_attention_heads
    found = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
    }
    if kind == "gpt2":
        return found | {
            "feed_forward_length": config.n_inner or 4 * config.hidden_size,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind == "stablelm":
        found["attention.layer_norm_epsilon"] = config.layer_norm_eps
    else:
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if rope.get("rope_type") == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        log = math.log(scale) / math.log(config.original_max_position_embeddings)
        found["rope.scaling.attn_factor"] = math.sqrt(1 + log)
    if kind == "phi3":
        found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        found["attention.key_length"] = found["attention.value_length"] = None
    if kind == "granite":
        found["attention.scale"] = float(config.attention_multiplier)
        found["logit_scale"] = float(config.logits_scaling)
        found["embedding_scale"] = float(config.embedding_multiplier)
        found["residual_scale"] = float(config.residual_multiplier)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", 0):
        found |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
    if kind == "qwen3_moe":
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind in ("mistral", "mixtral", "phi3", *OFFSET_NORMS):
        found["attention.sliding_window"] = config.sliding_window or 0
    if kind == "gemma3_text":
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        found["rope.freq_base_swa"] = float(local)
    if kind in OFFSET_NORMS:
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = rope["factor"]
        found["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        for field in ("beta_fast", "beta_slow"):
            found[f"rope.scaling.yarn_{field}"] = rope.get(field)
    return found


def _converted(hf):
    config, kind = hf.config, hf.config.model_type
    tied = config.tie_word_embeddings
    for name, weight in hf.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        *_, projection, last = name.split(".")
        if kind in _PERMUTED and projection in ("q_proj", "k_proj"):
            heads = config.num_attention_heads
            heads = heads if projection == "q_proj" else config.num_key_value_heads
            halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if kind in OFFSET_NORMS and name.endswith("norm.weight"):
            weight = weight + 1
        if kind == "gpt2" and projection in ("c_attn", "c_proj", "c_fc") and weight.ndim == 2:
            weight = weight.t()
        layer = "".join(name.split(".")[2:3])
        if projection == "experts":
            parts = _EXPERTS[last]
            for part, piece in zip(parts, weight.chunk(len(parts), 1), strict=True):
                yield f"blk.{layer}.{part}.weight", piece
        elif name.endswith("mlp.gate.weight"):
            yield f"blk.{layer}.ffn_gate_inp.weight", weight
        else:
            yield name, weight


def _llama3_divisors(config):
    """What LlamaModel.generate_extra_tensors of the converter computes."""
    rope = config.rope_parameters
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    dim = config.head_dim
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / scaled.double()).float()

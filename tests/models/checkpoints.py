"""Small random checkpoints of transformers' own models, and their logits in float64 throughout."""

import math
import re

import torch
from torch.overrides import TorchFunctionMode

VOCAB, LENGTH = 131, 64
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=100,
    max_position_embeddings=LENGTH,
)
NO_TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
GPT2 = dict(
    vocab_size=VOCAB, n_embd=72, n_layer=3, n_head=6, n_positions=LENGTH, layer_norm_epsilon=1e-5
)
GEMMA3 = dict(
    num_hidden_layers=7,
    sliding_window=6,
    query_pre_attn_scalar=20,
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
    ),
)
# Of 12 features 6 rotate.
PHI3 = dict(
    head_dim=None,
    partial_rotary_factor=0.5,
    original_max_position_embeddings=32,
    rope_parameters=dict(
        rope_type="longrope", short_factor=[1.0, 1.3, 1.1], long_factor=[1.0, 1.7, 4.5]
    ),
)
GRANITE = dict(
    head_dim=None,
    embedding_multiplier=3.5,
    logits_scaling=3.0,
    residual_multiplier=0.22,
    attention_multiplier=0.2,
)
MIXTRAL = dict(num_local_experts=5, num_experts_per_tok=2)
QWEN3_MOE = dict(
    moe_intermediate_size=40, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True
)
OFFSET_NORMS = ("gemma2", "gemma3_text")
# model_type, then what its config has beside the sizes.
MODELS = {
    "llama": ("llama", {}),
    "llama tied, biased": (
        "llama",
        dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "mistral": ("mistral", dict(sliding_window=7)),
    "mistral no window": ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral windows, one of three": (
        "mixtral",
        dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=7),
    ),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 late windows": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biased": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe windows, as they are": (
        "qwen3_moe",
        QWEN3_MOE
        | dict(use_sliding_window=True, sliding_window=5, norm_topk_prob=False, head_dim=None),
    ),
    "olmoe": ("olmoe", dict(head_dim=None, num_experts=6, num_experts_per_tok=3)),
    "phi3": ("phi3", PHI3),
    "phi3 long, windows": (
        "phi3",
        PHI3 | dict(original_max_position_embeddings=16, sliding_window=7),
    ),
    "phi3 plain": ("phi3", dict(head_dim=None, partial_rotary_factor=0.5)),
    "smollm3": ("smollm3", dict(num_hidden_layers=5)),
    "smollm3 untied, other layers": (
        "smollm3",
        dict(tie_word_embeddings=False, attention_bias=True, no_rope_layers=[0, 1, 0]),
    ),
    "granite": ("granite", GRANITE),
    "granite tied, biased": (
        "granite",
        GRANITE
        | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, logits_scaling=0.7),
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 tied, biased": ("olmo2", dict(tie_word_embeddings=True, attention_bias=True)),
    "gemma2": ("gemma2", dict(sliding_window=6, query_pre_attn_scalar=20)),
    "gemma2 untied, no caps": (
        "gemma2",
        dict(tie_word_embeddings=False, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3 wide windows": ("gemma3_text", GEMMA3 | dict(sliding_window=LENGTH)),
    "gemma3 untied, other layers": (
        "gemma3_text",
        dict(
            tie_word_embeddings=False,
            final_logit_softcapping=20.0,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", dict(tie_word_embeddings=False, n_inner=90)),
    "stablelm": (
        "stablelm",
        dict(
            head_dim=None,
            use_qkv_bias=True,
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5),
        ),
    ),
}


class Exact(TorchFunctionMode):
    """Every float32 that the code inside asks for is a float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        swap = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        args = tuple(map(swap, args))
        return function(*args, **{name: swap(value) for name, value in kwargs.items()})


def hf_config(model_type, **changes):
    from transformers import AutoConfig

    sizes = GPT2 if model_type == "gpt2" else SIZES
    # What is written in PyTorch, not products that take no float64.
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    options = eager | NO_TOKENS | sizes | changes
    # None leaves a size to the default of the architecture.
    return AutoConfig.for_model(
        model_type, **{k: v for k, v in options.items() if v is not None or k not in SIZES}
    )


def hf_model(config, dtype=torch.float32, seed=0):
    """transformers' model with weights that make logits, scores and gates near one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    offset = config.model_type in OFFSET_NORMS
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan_in = weight.shape[0 if config.model_type == "gpt2" and ".h." in name else -1]
                weight.normal_(std=1.5 / math.sqrt(fan_in))
            elif name.endswith("bias"):
                weight.normal_(std=0.3)
            else:
                weight.uniform_(-0.5, 0.5).add_(0 if offset else 1)
    return model.to(dtype)


def exact_model(model):
    """`model` had it been written in float64: transformers keeps norms, angles and the softmax in
    float32. To be called within Exact()."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_config(model.config, dtype=torch.float64).eval()
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    return exact


def exact_logits(model, token_ids, *chunks):
    """The logits in float64 throughout."""
    with Exact():
        logits = hf_logits(exact_model(model), token_ids, *chunks)
    assert logits.dtype == torch.float64
    return logits


def hf_logits(model, token_ids, *chunks):
    """transformers' logits, at once or with its cache in chunks of the given sizes."""
    if not chunks:
        with torch.no_grad():
            return model(token_ids, use_cache=False).logits
    cache, logits = None, []
    with torch.no_grad():
        for part in token_ids.split(list(chunks), 1):
            out = model(part, use_cache=True, past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def assert_error_ratio(ours, theirs, exact, share=1.0):
    """At most twice as wrong as transformers in the same dtype, plus one ulp of the largest, at
    that share of the tokens, which are those least wrong."""
    largest = exact.abs().max().item()
    eps = torch.finfo(ours.dtype).eps
    ulp = eps * 2.0 ** math.floor(math.log2(largest))
    our_error, their_error = (
        (logits.double() - exact).abs().amax(-1).quantile(share).item() for logits in (ours, theirs)
    )
    assert our_error <= 2 * their_error + ulp, (our_error, their_error, ulp)
    # That the oracle computes the same model: else both would be wrong, and alike.
    assert their_error <= max(eps, 1e-7) ** 0.5 * largest


def step_by_step(model, token_ids, *chunks):
    """The logits from a cache, fed in chunks of the given sizes, then token by token."""
    seq = token_ids.shape[1]
    sizes = [*chunks, *[1] * (seq - sum(chunks))]
    cache = model.new_cache(len(token_ids), seq)
    with torch.inference_mode():
        return torch.cat([model(part, cache) for part in token_ids.split(sizes, 1)], dim=1)


def hf_names(model):
    """The state dict of `model` under transformers' names, its fused weights taken apart."""
    config, state = model.config, {}
    kv = config.num_kv_heads * config.head_dim
    parts = {
        "attention_norm": (["input_layernorm"], None),
        "attention.qkv_proj": (
            [f"self_attn.{x}_proj" for x in "qkv"],
            [config.num_heads * config.head_dim, kv, kv],
        ),
        "attention.o_proj": (["self_attn.o_proj"], None),
        "mlp_norm": (["post_attention_layernorm"], None),
        "mlp.gate_up_proj": (
            ["mlp.gate_proj", "mlp.up_proj"],
            [config.intermediate_size] * 2,
        ),
        "mlp.down_proj": (["mlp.down_proj"], None),
    }
    for key, weight in model.state_dict().items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", key)
        if match is None:
            state[key if key.startswith("lm_head") else f"model.{key}"] = weight
            continue
        names, rows = parts[match[2]]
        for name, part in zip(names, weight.split(rows) if rows else [weight], strict=True):
            state[f"model.layers.{match[1]}.{name}.weight"] = part
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def naive_greedy(model, prompt, count):
    """Greedy tokens by running the whole sequence anew at every step."""
    token_ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token_ids.append(int(model(torch.tensor([token_ids]))[0, -1].argmax()))
    return token_ids[len(prompt) :]


def llama_config(config):
    """transformers' configuration of a DecoderConfig of the Llama type."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )

"""Models whose matrices stay the codes of their GGUF file."""

import copy
import pickle

import pytest
import torch
from torch import nn

from aigc_fast.models.autoregressive import DecoderLM, Engine
from aigc_fast.models.autoregressive.layers import Norm
from aigc_fast.nn import QuantizedLinear

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from tests.models.checkpoints import GEMMA3, MIXTRAL, QWEN3_MOE, VOCAB, hf_config, hf_model
from tests.models.gguf_files import write_gguf

# Widths in whole groups of 32 columns.
WIDE = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
# Of SmolLM3 the fourth layer is the first that does not rotate.
BESIDE = {
    "mistral": {"sliding_window": 5},
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE | {"moe_intermediate_size": 64},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
    "smollm3": {"num_hidden_layers": 4},
    "granite": {"residual_multiplier": 0.5},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 20},
    "gemma3_text": GEMMA3,
}
ARCHITECTURES = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "phi3", "smollm3",
    "granite", "olmo2", "gemma2", "gemma3_text", "stablelm",
]  # fmt: skip
#: whose layer norms are none that `ops.decoder_step` has
NOT_FUSED = ["stablelm"]


def written(tmp_path, model_type: str, storage: str):
    hf = hf_model(hf_config(model_type, **WIDE, **BESIDE.get(model_type, {})))
    return write_gguf(tmp_path / "model.gguf", hf, gguf.GGMLQuantizationType[storage])


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_logits_are_those_of_the_dequantised_model(model_type, storage, tmp_path):
    path = written(tmp_path, model_type, storage)
    packed = DecoderLM.from_pretrained(path, packed=True)
    dense, exact = (DecoderLM.from_pretrained(path, d) for d in (torch.float32, torch.float64))
    assert sum(isinstance(m, QuantizedLinear) for m in packed.modules()) >= 4 * len(packed.layers)
    token_ids = torch.randint(VOCAB, (2, 7))
    results = []
    for model in (packed, dense, exact):
        cache = model.new_cache(2, 12)
        with torch.no_grad():
            steps = [model(token_ids[:, :4], cache)]
            steps += [model(token_ids[:, i : i + 1], cache) for i in range(4, 7)]
        results.append(torch.cat(steps, 1))
    ours, plain, true = results
    error, limit = ((t - true).square().mean().sqrt() for t in (ours, plain))
    assert error <= 2 * limit
    assert is_fused(packed) == (model_type not in NOT_FUSED)


def is_fused(model: DecoderLM) -> bool:
    return bool(model._fused and model._fused.weights)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in NOT_FUSED])
def test_the_fused_step_is_the_layers_one_by_one(model_type, cache_dtype, tmp_path, monkeypatch):
    model = DecoderLM.from_pretrained(
        written(tmp_path, model_type, "Q4_1"), packed=True, quantize_activations=True
    )
    prompts = [[1, 5, 9], [7], [2, 2, 2, 2, 2, 2]]

    def answers() -> list[list[int]]:
        engine = Engine(model, page_size=4, cache_dtype=cache_dtype)
        requests = [engine.add(prompt, 12) for prompt in prompts]
        while not engine.idle:
            engine.step()
        return [request.tokens for request in requests]

    fused = answers()
    assert is_fused(model)
    monkeypatch.setattr(DecoderLM, "_fused_step", lambda *_: None)
    assert answers() == fused


def test_a_cast_model_is_looked_at_again(tmp_path):
    model = DecoderLM.from_pretrained(written(tmp_path, "llama", "Q8_0"), packed=True)
    token = torch.tensor([[3]])
    logits = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        with torch.no_grad():
            logits[dtype] = model(token, model.new_cache(1, 4))
        assert logits[dtype].dtype == dtype
        torch.testing.assert_close(
            logits[dtype].float(), logits[torch.float32], rtol=0.02, atol=0.02
        )


def other(linear: QuantizedLinear, group_size: int = 32) -> QuantizedLinear:
    dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
    return QuantizedLinear.from_linear(dense, bits=8, group_size=group_size)


class Doubled(nn.Module):
    """A layer, or a product of one, in another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *rest):
        out = self.inner(hidden, *rest)
        return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out


EXCHANGES = {
    "a product": lambda m: setattr(m.layers[1].mlp, "down_proj", other(m.layers[1].mlp.down_proj)),
    "a product of other groups": lambda m: setattr(
        m.layers[1].attention, "o_proj", other(m.layers[1].attention.o_proj, 64)
    ),
    "a wrapped product": lambda m: setattr(
        m.layers[1].mlp, "down_proj", Doubled(m.layers[1].mlp.down_proj)
    ),
    "codes": lambda m: setattr(
        m.layers[1].mlp.gate_up_proj, "weight", other(m.layers[1].mlp.gate_up_proj).weight
    ),
    "the weight of a norm": lambda m: setattr(
        m.layers[1].mlp_norm, "weight", nn.Parameter(torch.rand(64))
    ),
    "a part of a layer": lambda m: setattr(m.layers[1], "mlp", m.layers[0].mlp),
    "a layer": lambda m: m.layers.__setitem__(1, copy.deepcopy(m.layers[0])),
    "a wrapped layer": lambda m: m.layers.__setitem__(1, Doubled(m.layers[1])),
    "all layers": lambda m: setattr(
        m, "layers", nn.ModuleList([*m.layers[:-1], copy.deepcopy(m.layers[0])])
    ),
    "fewer layers": lambda m: setattr(m, "layers", m.layers[:-1]),
    "the last norm": lambda m: setattr(m, "norm", copy.deepcopy(m.layers[0].mlp_norm)),
    "a layer more": lambda m: m.layers.append(copy.deepcopy(m.layers[0])),
    "a softcap": lambda m: setattr(m.layers[0].attention, "softcap", 1e-3),
    "a scale": lambda m: setattr(m.layers[0].attention, "scale", 3.0),
    "scales": lambda m: [setattr(layer.attention, "scale", 3.0) for layer in m.layers],
    "an epsilon": lambda m: setattr(m.layers[0].mlp_norm, "eps", 3.0),
    "the last epsilon": lambda m: setattr(m.norm, "eps", 3.0),
    "epsilons": lambda m: [setattr(norm, "eps", 3.0) for norm in m.modules()
                           if isinstance(norm, Norm)],
    "a rotation": lambda m: setattr(m.layers[0].attention, "rotation", None),
    "a window": lambda m: setattr(m.layers[0].attention, "window", 1),
    "windows": lambda m: [setattr(layer.attention, "window", 2) for layer in m.layers],
    "an activation": lambda m: setattr(m.layers[0].mlp, "activation", "geglu_tanh"),
    "activations": lambda m: [setattr(layer.mlp, "activation", "geglu_tanh") for layer in m.layers],
    "a norm less": lambda m: setattr(m.layers[1], "mlp_norm", None),
    "norms less": lambda m: [setattr(layer, name, None) for layer in m.layers
                             for name in ("attention_norm", "mlp_norm")],
    "norms behind": lambda m: [setattr(layer, name, copy.deepcopy(m.norm)) for layer in m.layers
                               for name in ("post_attention_norm", "post_mlp_norm")],
    "biases": lambda m: [setattr(layer.attention.qkv_proj, "bias", torch.rand(128))
                         for layer in m.layers],
    "a bias": lambda m: setattr(m.layers[0].mlp.down_proj, "bias", torch.rand(64)),
    "a residual scale": lambda m: setattr(m.layers[0], "residual_scale", 0.5),
    "a forward": lambda m: setattr(m.layers[0].mlp, "forward", lambda x: 3 * x),
    "a hook": lambda m: m.layers[0].mlp.register_forward_hook(lambda module, args, out: 3 * out),
}  # fmt: skip


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_an_exchanged_part_is_looked_at_again(exchange, tmp_path, monkeypatch):
    model = DecoderLM.from_pretrained(written(tmp_path, "llama", "Q8_0"), packed=True)

    def step() -> torch.Tensor:
        cache = model.new_cache(1, 4)
        with torch.no_grad():
            model(torch.tensor([[5, 7]]), cache)
            return model(torch.tensor([[3]]), cache)

    with torch.no_grad():
        for norm in (model.norm, model.layers[0].mlp_norm):
            norm.weight.uniform_(0.5, 2)
    before = step()
    EXCHANGES[exchange](model)
    after = step()
    monkeypatch.setattr(DecoderLM, "_fused_step", lambda *_: None)
    torch.testing.assert_close(after, step(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_looked_at_by_itself(way, tmp_path, monkeypatch):
    model = DecoderLM.from_pretrained(written(tmp_path, "llama", "Q8_0"), packed=True)
    token = torch.tensor([[3]])
    with torch.no_grad():
        model(token, model.new_cache(1, 4))
        copied = way(model)
        for module in copied.modules():
            if isinstance(module, QuantizedLinear):
                module.quantize_activations = True
        after = copied(token, copied.new_cache(1, 4))
        monkeypatch.setattr(DecoderLM, "_fused_step", lambda *_: None)
        torch.testing.assert_close(after, copied(token, copied.new_cache(1, 4)))
        assert not torch.equal(after, model(token, model.new_cache(1, 4)))


def test_only_files_stay_packed(tmp_path):
    with pytest.raises(ValueError, match="packed: .* is a folder"):
        DecoderLM.from_pretrained(tmp_path, packed=True)

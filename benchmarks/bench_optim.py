"""A step of AdamW with clipping, averaged weights and a guard, beside torch's optimisers.

torch needs four calls for it: clip_grad_norm_, the finiteness of the norm, step and a lerp. Both
forms of its optimiser are timed, foreach (its default) and fused; its guard reads the norm, for
without that there is none.
"""

import copy

import pytest
import torch
from torch import nn

from aigc_fast._timing import interleaved
from aigc_fast.models.gan import DCGANGenerator, MLPGenerator
from aigc_fast.training import EMA, AdamW
from benchmarks.machine import DEVICE, plain_pass

MODELS = {
    "mlp": lambda: MLPGenerator(),
    "dcgan_64": lambda: DCGANGenerator(64),
    "transformer_12": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(256, 4, 1024), 12, enable_nested_tensor=False
    ),
}


def theirs(model: nn.Module, **options):
    optimizer, average = torch.optim.AdamW(model.parameters(), **options), copy.deepcopy(model)
    parameters, averages = list(model.parameters()), list(average.parameters())

    def step() -> None:
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if norm.isfinite():
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 0.1)

    return step


@pytest.mark.parametrize("name", MODELS)
def bench_optim(benchmark, request, name) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    models = [copy.deepcopy(model) for _ in range(3)]
    for copied in models:
        for p, q in zip(copied.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
    ema = EMA(models[2], 0.1)  # a decay that the first steps do not lower
    optimizer = AdamW(models[2].parameters(), max_norm=1.0, average=ema)
    steps = {
        "foreach": theirs(models[0]),
        "fused": theirs(models[1], fused=True),
        "ours": optimizer.step,
    }
    for step in steps.values():
        step()
    for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    size = sum(p.nbytes for p in model.parameters())
    quick = request.config.getoption("--quick")
    # Gradients twice; weights, both moments and the average read and written.
    steps["copy"] = plain_pass(10 * size, "copy")
    times = interleaved(steps, seconds=0.3 if quick else 3.0)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        tensors=len(list(model.parameters())),
        seconds=times,
        foreach_over_ours=times["foreach"] / times["ours"],
        fused_over_ours=times["fused"] / times["ours"],
        fraction_of_limit=times["copy"] / times["ours"],
    )
    benchmark.pedantic(steps["ours"], rounds=3 if quick else 10, warmup_rounds=1)

"""sample_tokens beside sorting in PyTorch, eager and compiled, and transformers' processors."""

import pytest
import torch

from aigc_fast import ops
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE, plain_pass
from tests.op_samples import OPS
from tests.op_samples.sampling import Sample


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Sorted logits with -inf for what does not survive, and their tokens."""
    x, token = logits.float().sort(-1, descending=True)
    if top_k:
        x[:, top_k:] = -torch.inf
    if temperature == 0:
        x[:, 1:] = -torch.inf
    elif temperature != 1:
        x = x / temperature
    p = x.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    if min_p:
        p = p.masked_fill(p < min_p * p[:, :1], 0)
    return p, token


def by_sorting(logits, **options):
    p, token = filtered(logits, **options)
    token = token.gather(1, torch.multinomial(p, 1))
    return token, logits.log_softmax(-1, dtype=torch.float32).gather(1, token)


def by_transformers(logits, top_k=0, top_p=1.0, min_p=0.0):
    # No log-probability: that is not counted against it.
    from transformers.generation import logits_process as process

    x = logits.float()
    if top_k:
        x = process.TopKLogitsWarper(top_k)(None, x)
    if top_p < 1:
        x = process.TopPLogitsWarper(top_p)(None, x)
    if min_p:
        x = process.MinPLogitsWarper(min_p)(None, x)
    return torch.multinomial(x.softmax(-1), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OPS["sample_tokens"].large(), ids=lambda s: s.name)
def bench_sample_tokens(benchmark, request, sample: Sample, dtype) -> None:
    logits = sample.args[0].to(DEVICE, dtype)
    numbers = {k: v.to(DEVICE) for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)}
    options = {k: v for k, v in sample.kwargs.items() if k not in numbers}
    calls = {
        "eager": lambda: by_sorting(logits, **options),
        "ours": lambda: ops.sample_tokens(logits, **options, **numbers),
    }
    quick = request.config.getoption("--quick")
    if not quick:
        compiled = torch.compile(by_sorting)
        calls["compile"] = lambda: compiled(logits, **options)
    if "temperature" not in options:
        calls["transformers"] = lambda: by_transformers(logits, **options)
    # No speed-up is printed for a token that must not be, or a wrong log-probability.
    tokens, logprobs = calls["ours"]()
    p, order = filtered(logits, **options)
    if options.get("top_p"):  # rounding decides at the edge of the nucleus
        p = p + filtered(logits, **options | {"top_p": options["top_p"] + 1e-5})[0]
    assert p.gather(1, (order == tokens[:, None]).int().argmax(-1, keepdim=True)).gt(0).all()
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - exact).abs().max() < 1e-5

    calls["read"] = plain_pass(2 * logits.nbytes, "read")
    times = interleaved(calls, seconds=0.5 if quick else 3.0)
    benchmark.extra_info.update(
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        seconds=times,
        eager_over_ours=times["eager"] / times["ours"],
        bytes=2 * logits.nbytes,
        gigabytes_per_second=2 * logits.nbytes / times["ours"] / 1e9,
        limit="read",
        fraction_of_limit=times["read"] / times["ours"],
    )
    if not quick:
        benchmark.extra_info["compile_over_ours"] = times["compile"] / times["ours"]
    if "transformers" in times:
        benchmark.extra_info["transformers_over_ours"] = times["transformers"] / times["ours"]
    benchmark.pedantic(calls["ours"], rounds=3 if quick else 10, warmup_rounds=1)

"""What a call costs beside the work: 64 elements, next to aten.mul."""

import pytest
import torch

from aigc_fast import ops
from aigc_fast._timing import interleaved

x = torch.randn(1, 64)
w = torch.randn(64)
CALLS = {
    "bias_act": lambda x, w: ops.bias_act(x, w, 1, "lrelu"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CALLS)
def bench_overhead(benchmark, name, gradients) -> None:
    a, b = x.clone().requires_grad_(gradients), w.clone().requires_grad_(gradients)
    calls = {"aten.mul": lambda: torch.mul(a, b), "ours": lambda: CALLS[name](a, b)}
    times = interleaved(calls, seconds=0.5)
    benchmark.extra_info.update(
        microseconds={name: seconds * 1e6 for name, seconds in times.items()},
        ours_over_mul=times["ours"] / times["aten.mul"],
    )
    benchmark.pedantic(calls["ours"], rounds=100, iterations=100, warmup_rounds=1)

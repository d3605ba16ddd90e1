"""What a call costs the host beside the work: 64 elements, next to aten.mul."""

import pytest
import torch

from aigc_fast import ops
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE

ROW = torch.tensor([1.0, -0.5, float("inf"), 0.9, 0.0, 0.1, 0.0], device=DEVICE)
ANGLES = torch.randn(1, 32, device=DEVICE)
ALPHA = torch.ones(1, device=DEVICE)
#: each takes two (1, 1, 1, 64) tensors and a weight of 64 elements
CALLS = {
    "bias_act": lambda x, y, w: ops.bias_act(x, w, 3, "lrelu"),
    "rms_norm": lambda x, y, w: ops.rms_norm(x, w),
    "add_rms_norm": lambda x, y, w: ops.add_rms_norm(x, y, w),
    "swiglu": lambda x, y, w: ops.swiglu(x, y),
    "apply_rotary": lambda x, y, w: ops.apply_rotary(x, ANGLES, ANGLES),
    "scheduler_step": lambda x, y, w: ops.scheduler_step(x, y, ROW),
    "add_noise": lambda x, y, w: ops.add_noise(x, y, ALPHA, ALPHA),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CALLS)
def bench_overhead(benchmark, name, gradients) -> None:
    options = {"device": DEVICE, "requires_grad": gradients}
    x, y = (torch.randn(1, 1, 1, 64, **options) for _ in range(2))
    w = torch.randn(64, **options)
    calls = {"aten.mul": lambda: torch.mul(x, y), "ours": lambda: CALLS[name](x, y, w)}
    with torch.set_grad_enabled(gradients):
        times = interleaved(calls, seconds=0.5, on_host=True)
        benchmark.extra_info.update(
            microseconds={name: seconds * 1e6 for name, seconds in times.items()},
            ours_over_mul=times["ours"] / times["aten.mul"],
        )
        benchmark.pedantic(calls["ours"], rounds=100, iterations=100, warmup_rounds=1)

"""Batch normalisation with its activation in training: forward, with backward, and the double
backward, which torch.compile cannot do."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE, plain_pass
from tests.op_samples import OPS
from tests.ops.test_every_op import assert_as_good_as_torch, cast

OP = OPS["batch_norm_act"]


def eager(x, mean, var, weight, bias, training, momentum, eps, act):
    return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), 0.2)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_batch_norm_act(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_double_backward(benchmark, request, sample, dtype) -> None:
    """The gradient of a squared gradient's sum: what R1 and WGAN-GP add to a step."""
    quick = request.config.getoption("--quick")
    calls, results = {}, {}
    for name, function, kind in (
        ("exact", eager, torch.float64),
        ("eager", eager, dtype),
        ("ours", ops.batch_norm_act, dtype),
    ):
        args = cast(cast(sample.args, dtype), kind, DEVICE)
        inputs = [args[0], args[3], args[4]]
        for t in inputs:
            t.requires_grad_()
        y = function(*args)
        dy = torch.ones_like(y).mul_(0.5).requires_grad_()
        gradient = torch.autograd.grad(y, inputs, dy, create_graph=True)
        upstream = [torch.ones_like(gradient[0]), *gradient[1:]]

        def call(gradient=gradient, inputs=inputs, dy=dy, upstream=upstream):
            return torch.autograd.grad(
                gradient, [*inputs, dy], upstream, retain_graph=True, allow_unused=True
            )

        results[name], calls[name] = call(), call
    del calls["exact"]
    exact = [t.double().cpu() for t in results["exact"]]
    assert_as_good_as_torch(results["ours"], results["eager"], exact, dtype)
    # Read gg, dy and x, write two gradients; on a GPU the three are read twice.
    moved = (8 if DEVICE == "cuda" else 5) * sample.args[0].numel() * dtype.itemsize
    times = interleaved({**calls, "copy": plain_pass(moved, "copy")}, seconds=0.5 if quick else 3.0)
    benchmark.extra_info.update(
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        seconds=times,
        eager_over_ours=times["eager"] / times["ours"],
        compile="n/a: torch.compile does not support double backward",
        bytes=moved,
        gigabytes_per_second=moved / times["ours"] / 1e9,
        limit="copy",
        fraction_of_limit=times["copy"] / times["ours"],
    )
    benchmark.pedantic(calls["ours"], rounds=3 if quick else 10, warmup_rounds=1)

"""Batch, instance and pixel norm with the activation after them: forward, with backward, and the
double backward of a gradient penalty, which torch.compile cannot do."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE, plain_pass
from tests.op_samples import OPS
from tests.ops.test_every_op import assert_as_good_as_torch, cast


def batch_norm(x, mean, var, weight, bias, training, momentum, eps, act):
    return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), 0.2)


def instance_norm(x, weight, bias, eps, act):
    return F.leaky_relu(F.instance_norm(x, None, None, weight, bias, eps=eps), 0.2)


def pixel_norm(x, act):
    return F.leaky_relu(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8), 0.2)


EAGER = {
    "batch_norm_act": batch_norm,
    "instance_norm_act": instance_norm,
    "pixel_norm_act": pixel_norm,
}
CALLS = [pytest.param(n, s, id=f"{n}-{s.name}") for n in EAGER for s in OPS[n].large()]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@DTYPES
@pytest.mark.parametrize(("name", "sample"), CALLS)
def bench_norm_act(measure, name, sample, dtype, direction) -> None:
    measure(OPS[name], sample, dtype, eager=EAGER[name], backward=direction != "forward")


@DTYPES
@pytest.mark.parametrize(("name", "sample"), CALLS)
def bench_double_backward(benchmark, request, name, sample, dtype) -> None:
    """The gradient of a squared gradient's sum: what R1 and WGAN-GP add to a step."""
    quick = request.config.getoption("--quick")
    op, calls, results = OPS[name], {}, {}
    for variant, function, kind in (
        ("exact", EAGER[name], torch.float64),
        ("eager", EAGER[name], dtype),
        ("ours", op.function, dtype),
    ):
        args, kwargs = cast(cast((sample.args, sample.kwargs), dtype), kind, DEVICE)
        inputs = [t for t in args if isinstance(t, torch.Tensor)]
        for t in inputs:
            t.requires_grad_()
        y = function(*args, **kwargs)
        dy = torch.ones_like(y).mul_(0.5).requires_grad_()
        gradient = torch.autograd.grad(y, inputs, dy, create_graph=True)
        upstream = [torch.ones_like(gradient[0]), *gradient[1:]]

        def call(gradient=gradient, inputs=inputs, dy=dy, upstream=upstream):
            return torch.autograd.grad(
                gradient, [*inputs, dy], upstream, retain_graph=True, allow_unused=True
            )

        results[variant], calls[variant] = [t for t in call() if t is not None], call
    del calls["exact"]
    exact = [t.double().cpu() for t in results["exact"]]
    if all(len(found) == len(exact) for found in results.values()):  # a straight act has none
        assert_as_good_as_torch(results["ours"], results["eager"], exact, dtype)
    # Read gg, dy and x, write two gradients; on a GPU the three are read twice.
    moved = (8 if DEVICE == "cuda" else 5) * sample.args[0].numel() * dtype.itemsize
    seconds, rounds = (0.2, 1) if quick else (3.0, 5)
    calls = {**calls, "copy": plain_pass(moved, "copy")}
    times = interleaved(calls, seconds=seconds, rounds=rounds)
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

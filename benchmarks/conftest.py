"""One benchmark is one call of one operator: checked against float64, then eager PyTorch,
torch.compile and ours timed in turns in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import aigc_fast
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE, bandwidth
from tests.op_samples import Sample
from tests.ops.test_every_op import assert_as_good_as_torch, cast, contiguous_grad, tensors, worst


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="all suites in two minutes: fewer calls")


@dataclass
class Measure:
    """The fixture `measure`: times one case and notes what it found beside it."""

    benchmark: Any
    quick: bool

    def __call__(
        self,
        sample: Sample,
        dtype: torch.dtype,
        *,
        ours: Callable[..., Any],
        eager: Callable[..., Any],
        backward: bool = False,
        reads_only: bool = False,
        bytes_moved: int | None = None,
        peers: dict[str, Callable[..., Any]] | None = None,
    ) -> dict[str, float]:
        """Medians in seconds of eager, compile, ours and the peers, for the same arguments.

        eager:       the best plain PyTorch for the call; torch.compile compiles it
        reads_only:  compare with the read bandwidth (attention), not with that of a copy
        bytes_moved: bytes that must move; default: every input once and every output once
        """
        args, kwargs = cast((sample.args, sample.kwargs), dtype, DEVICE)
        inputs = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
        variants = {"eager": eager, "compile": torch.compile(eager), "ours": ours, **(peers or {})}
        exact = self._run(eager, *cast((args, kwargs), torch.float64), backward)
        plain = self._run(eager, args, kwargs, backward)
        mine = self._run(ours, args, kwargs, backward)
        # No speed-up is printed for a wrong result.
        assert_as_good_as_torch(mine, plain, [t.cpu() for t in exact], dtype)
        calls = {
            name: lambda f=f: self._run(f, args, kwargs, backward) for name, f in variants.items()
        }
        times = interleaved(calls, seconds=0.5 if self.quick else 3.0)
        if bytes_moved is None:
            bytes_moved = sum(t.nbytes for t in [*inputs, *mine])
            if backward:  # the incoming gradient, and the inputs or the output read again
                bytes_moved += 2 * sum(t.nbytes for t in self._run(ours, args, kwargs, False))
        kind = "read" if reads_only else "copy"
        self.benchmark.extra_info.update(
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            seconds=times,
            eager_over_ours=times["eager"] / times["ours"],
            compile_over_ours=times["compile"] / times["ours"],
            **{f"{peer}_over_ours": times[peer] / times["ours"] for peer in peers or {}},
            bytes=bytes_moved,
            gigabytes_per_second=bytes_moved / times["ours"] / 1e9,
            bandwidth=kind,
            fraction_of_bandwidth=bytes_moved / times["ours"] / bandwidth(bytes_moved, kind),
            extra_memory={n: self._memory(calls[n]) for n in ("eager", "ours")},
            error={
                "eager": max(worst(p, e.cpu().double()) for p, e in zip(plain, exact, strict=True)),
                "ours": max(worst(o, e.cpu().double()) for o, e in zip(mine, exact, strict=True)),
            },
        )
        self.benchmark.pedantic(calls["ours"], rounds=3 if self.quick else 10, warmup_rounds=1)
        return times

    def _run(self, f: Callable[..., Any], args: tuple, kwargs: dict, backward: bool) -> list:
        """The call's outputs, or with `backward` the gradients of its floating inputs."""
        if not backward:
            with torch.no_grad():
                return tensors(f(*args, **kwargs))
        inputs = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
        for t in inputs:
            t.requires_grad_()
        outputs = tensors(f(*args, **kwargs))
        if not hasattr(self, "_upstream"):
            self._upstream: list[Tensor] = [contiguous_grad(t, i) for i, t in enumerate(outputs)]
        grads = [g.to(o.dtype) for g, o in zip(self._upstream, outputs, strict=True)]
        return list(torch.autograd.grad(outputs, inputs, grads, allow_unused=False))

    def _memory(self, call: Callable[[], Any]) -> int:
        """Most bytes that the call holds at a time, its outputs included."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak


@pytest.fixture
def measure(benchmark, request) -> Measure:
    return Measure(benchmark, request.config.getoption("--quick"))


@pytest.fixture(autouse=True)
def _compiled_kernels() -> None:
    """A benchmark of the reference under our name would be a lie."""
    import os

    os.environ["AIGC_FAST_STRICT"] = "1"
    torch._dynamo.reset()
    assert aigc_fast.list_ops()

"""One benchmark is one call of one operator: checked against float64, then eager PyTorch,
torch.compile and ours timed in turns in one process."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE, keep_freed_memory, peak_memory, plain_pass
from tests.op_samples import OpSamples, Sample
from tests.ops.test_every_op import (
    assert_as_good_as_torch,
    call,
    cast,
    contiguous_grad,
    gradients,
    tensors,
    variables,
    worst,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    which = parser.getgroup("which calls of each benchmark")
    which.addoption("--quick", action="store_true", help="the smallest one, briefly")
    which.addoption("--largest", action="store_true", help="the largest, in bfloat16")


def pytest_configure() -> None:
    keep_freed_memory()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--quick keeps of each benchmark the call of the smallest sample; --largest that of the
    largest, forward and with gradients, operators before models, which may find no time."""
    quick, largest = config.getoption("--quick"), config.getoption("--largest")
    if not (quick or largest):
        return

    def parameters(item: pytest.Item) -> dict[str, Any]:
        return item.callspec.params if hasattr(item, "callspec") else {}

    def size(item: pytest.Item) -> tuple[int, bool]:
        sample = parameters(item).get("sample")
        elements = tensors((sample.args, sample.kwargs)) if isinstance(sample, Sample) else []
        return sum(t.numel() for t in elements), parameters(item).get("dtype") == torch.bfloat16

    groups: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        direction = parameters(item).get("direction") if largest else None
        groups.setdefault((item.path, item.originalname, direction), []).append(item)
    if quick:
        items[:] = [min(group, key=lambda item: size(item)[0]) for group in groups.values()]
    else:
        items[:] = [max(group, key=size) for group in groups.values()]
        items.sort(key=lambda item: "measure" not in item.fixturenames)


@dataclass
class Measure:
    """The fixture `measure`: times one case and notes what it found beside it."""

    benchmark: Any
    quick: bool
    upstream: dict = field(default_factory=dict)

    def __call__(
        self,
        op: OpSamples,
        sample: Sample,
        dtype: torch.dtype,
        *,
        eager: Callable[..., Any],
        backward: bool = False,
        limit: str = "copy",
        bytes_moved: int | None = None,
    ) -> None:
        """Times in turns the call as eager PyTorch, torch.compile and ours, and its limit. With
        --quick nothing is compiled, which takes seconds for what then takes microseconds.

        eager:       the best plain PyTorch for the call; torch.compile compiles it
        backward:    forward and backward, with respect to every input
        limit:       the plain pass over as many bytes that it is held against: "copy", "add" (two
                     tensors read for one written) or "read" (a sum)
        bytes_moved: bytes that must move; default: every input once and every output once
        """
        args, kwargs = cast((sample.args, sample.kwargs), dtype, DEVICE)
        run = self._gradients if backward else self._outputs
        plain_op = dataclasses.replace(op, function=eager)
        exact = [t.cpu() for t in run(plain_op, *cast((args, kwargs), torch.float64))]
        plain, mine = run(plain_op, args, kwargs), run(op, args, kwargs)
        # No speed-up is printed for a wrong result.
        assert_as_good_as_torch(mine, plain, exact, dtype)
        variants = {"eager": plain_op, "ours": op}
        if not self.quick:
            variants["compile"] = dataclasses.replace(op, function=torch.compile(eager))
        timed = self._forward_backward if backward else self._forward
        calls = {n: timed(v, args, kwargs) for n, v in variants.items()}
        if bytes_moved is None:
            outputs = self._outputs(op, args, kwargs)
            bytes_moved = sum(t.nbytes for t in [*tensors((args, kwargs)), *outputs])
            if backward:  # then the upstream gradients, the inputs again, and their gradients
                bytes_moved *= 2
        # A GPU makes a thousand calls, and empties its cache before each, in half a second.
        seconds, rounds = (0.2, 1) if self.quick else (0.5 if DEVICE == "cuda" else 2.5, 15)
        with torch.set_grad_enabled(backward):
            times = interleaved(calls, seconds=seconds, rounds=rounds)
            # With ours alone: after others' code a call waits for its own, which is no matter of
            # bandwidth.
            pair = {"ours": calls["ours"], limit: plain_pass(bytes_moved, limit)}
            passes = interleaved(pair, seconds=seconds / 2, rounds=rounds)
        if not self.quick:
            self.benchmark.extra_info["compile_over_ours"] = times["compile"] / times["ours"]
        self.benchmark.extra_info.update(
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            seconds=times,
            eager_over_ours=times["eager"] / times["ours"],
            bytes=bytes_moved,
            gigabytes_per_second=bytes_moved / passes["ours"] / 1e9,
            limit=limit,
            limit_seconds=passes,
            fraction_of_limit=passes[limit] / passes["ours"],
            extra_memory={
                n: peak_memory(lambda v=variants[n]: run(v, args, kwargs))
                for n in ("eager", "ours")
            },
            error={"eager": _worst(plain, exact), "ours": _worst(mine, exact)},
        )
        with torch.set_grad_enabled(backward):
            self.benchmark.pedantic(calls["ours"], rounds=1 if self.quick else 10)

    @staticmethod
    def _forward(op: OpSamples, args: tuple, kwargs: dict) -> Callable[[], Any]:
        """The call as it is timed: nothing around it."""
        return functools.partial(op.function, *args, **kwargs)

    def _forward_backward(self, op: OpSamples, args: tuple, kwargs: dict) -> Callable[[], Any]:
        inputs = variables(op, args, kwargs)
        for t in inputs:
            t.requires_grad_()
        outputs = call(op, args, kwargs)
        upstream = [self._upstream_of(t, i) for i, t in enumerate(outputs) if t.requires_grad]

        def timed() -> None:
            outputs = op.function(*args, **kwargs)
            if len(upstream) > 1 or not isinstance(outputs, Tensor):
                outputs = [t for t in tensors(outputs) if t.requires_grad]
            torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)

        return timed

    @staticmethod
    def _outputs(op: OpSamples, args: tuple, kwargs: dict) -> list[Tensor]:
        with torch.no_grad():
            return call(op, args, kwargs)

    def _gradients(self, op: OpSamples, args: tuple, kwargs: dict) -> list[Tensor]:
        return gradients(op, args, kwargs, self._upstream_of)

    def _upstream_of(self, output: Tensor, i: int) -> Tensor:
        """The same upstream gradient in every call, made once, in the output's memory order."""
        key = (i, output.dtype, output.stride())
        if key not in self.upstream:
            self.upstream[key] = torch.empty_like(output).copy_(contiguous_grad(output, i))
        return self.upstream[key]


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def measure(benchmark, quick) -> Measure:
    return Measure(benchmark, quick)


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch) -> None:
    """A fall-back is an error: the reference's time under our name would be a lie."""
    monkeypatch.setenv("AIGC_FAST_STRICT", "1")
    torch._dynamo.reset()


def _worst(got: list[Tensor], exact: list[Tensor]) -> float:
    return max(worst(g, e) for g, e in zip(got, exact, strict=True))

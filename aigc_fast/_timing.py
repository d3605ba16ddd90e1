"""Times of several functions that do the same, measured in turn."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# A clock reading costs 0.1 us: shorter calls are timed several at once.
_SHORTEST = 20e-6
_ROUNDS = (5, 20_000)


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Median time of a call of each function, in seconds.

    The functions run in turn, A B C, B C A, C A B, ..., so that whatever else the machine does
    meets all of them alike, and none always runs behind the same neighbour.

    seconds: how long to measure in all; at least five rounds are run.
    device:  where the functions work. On "cuda" the device's own time is taken (CUDA events), with
             the caches flushed before each call.
    """
    timer = _CudaTimer(device) if torch.device(device).type == "cuda" else _CpuTimer()
    names, samples = list(functions), {name: [] for name in functions}
    repeats = {}
    for name in names:
        functions[name]()  # lazy initialisation, compilation
        timer.once(functions[name], 1)
        repeats[name] = timer.repeats(timer.seconds(timer.once(functions[name], 1)))
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < _ROUNDS[0] or (time.perf_counter() < deadline and rounds < _ROUNDS[1]):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timer.once(functions[name], repeats[name]))
        rounds += 1
    return {
        name: statistics.median(map(timer.seconds, marks)) / repeats[name]
        for name, marks in samples.items()
    }


class _CpuTimer:
    def once(self, function: Callable[[], Any], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return time.perf_counter() - start

    def seconds(self, mark: float) -> float:
        return mark

    def repeats(self, seconds: float) -> int:
        return max(1, math.ceil(_SHORTEST / max(seconds, 1e-9)))


class _CudaTimer:
    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        size = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flush = torch.empty(2 * size, dtype=torch.int8, device=self.device)

    def once(self, function: Callable[[], Any], repeats: int) -> tuple:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush also keeps the device busy while the CPU prepares the launch.
        self.flush.zero_()
        with torch.cuda.device(self.device):
            start.record()
            for _ in range(repeats):
                function()
            end.record()
            # Waiting here keeps the queue short and `seconds` of the clock what they say.
            end.synchronize()
        return start, end

    def seconds(self, mark: tuple) -> float:
        start, end = mark
        return start.elapsed_time(end) / 1e3

    def repeats(self, seconds: float) -> int:
        return 1  # more would find their input in the cache

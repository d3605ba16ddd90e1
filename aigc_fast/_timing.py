"""Timing that holds where the machine's speed drifts: the variants take turns."""

import random
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    variants: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    on_host: bool = False,
) -> dict[str, float]:
    """Median seconds of one call of each variant, measured in turns: A B C, B A C, ...

    seconds: roughly how long the whole measurement takes, beside one warm-up round
    rounds:  at least so many rounds, even where they take longer than `seconds`
    on_host: on a GPU too what the calls take on the host, which then runs ahead

    The order of each round is drawn anew: a variant whose memory the allocator has just returned to
    the system leaves page faults to the next one, which must not be always the same.
    A call much shorter than the clock's noise is repeated within a turn, the same number of times
    for every variant. On a GPU, CUDA events time the device and the L2 cache is flushed before
    each turn.
    """
    cuda = torch.cuda.is_available() and not on_host
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if cuda else None
    slowest = 0.0
    for call in variants.values():
        call()  # compiles, warms the caches
        slowest = max(slowest, _once(call, 1, flush))
    # At least 200 us a turn.
    repeats = 1 if cuda else max(1, int(2e-4 / max(slowest, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    order, draw = list(variants.items()), random.Random(0)
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        draw.shuffle(order)
        for name, call in order:
            times[name].append(_once(call, repeats, flush))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(call: Callable[[], object], repeats: int, flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    flush.zero_()
    start_event = torch.cuda.Event(enable_timing=True)
    end_event = torch.cuda.Event(enable_timing=True)
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3

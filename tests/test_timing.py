"""The clock of the benchmarks."""

import time

import pytest
import torch

from aigc_fast._timing import interleaved

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA events see no sleep")


def test_functions_take_turns():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(1e-3)) for name in "abc"}
    interleaved(calls, seconds=0, rounds=4)
    rounds = ["".join(order[i : i + 3]) for i in range(len(order) - 12, len(order), 3)]
    assert all(sorted(turns) == list("abc") for turns in rounds)
    assert len(set(rounds)) > 1  # not always in the same order


def test_medians_are_those_of_one_call():
    times = interleaved({"short": lambda: None, "long": lambda: time.sleep(2e-3)}, seconds=0.05)
    assert list(times) == ["short", "long"]
    assert times["short"] < 1e-4
    assert 2e-3 <= times["long"] < 1


def test_short_calls_are_repeated_within_a_turn():
    count = []
    interleaved({"a": lambda: count.append(1)}, seconds=0, rounds=5)
    assert len(count) > 50


def test_an_error_comes_through():
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0})

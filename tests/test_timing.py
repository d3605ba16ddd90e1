"""The clock of the benchmarks."""

import time

import pytest

from aigc_fast._timing import interleaved


def test_functions_take_turns_and_each_is_first_equally_often():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(1e-3)) for name in "abc"}
    interleaved(calls, seconds=0.03)
    rounds = order[9:]  # three calls of each to warm up
    assert len(rounds) >= 15
    assert "".join(rounds[:12]) == "abcbcacababc"


def test_medians_are_those_of_one_call():
    times = interleaved(
        {"short": lambda: None, "long": lambda: time.sleep(2e-3)}, seconds=0.05
    )
    assert list(times) == ["short", "long"]
    assert times["short"] < 1e-5
    assert times["long"] >= 2e-3


def test_every_function_is_measured_however_short_the_time():
    assert interleaved({"a": lambda: time.sleep(1e-3)}, seconds=0)["a"] >= 1e-3


def test_an_error_comes_through():
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0})

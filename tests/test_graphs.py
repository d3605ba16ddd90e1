"""Replay: what is recorded, when, and what cannot be. A tape stands in for CUDA's graphs."""

import pytest
import torch

from aigc_fast._graphs import Replay, check_graph
from tests.tape import NotCapturable, tapes

CPU = torch.device("cpu")


def test_it_runs_then_records_then_replays():
    total, calls = torch.zeros(3), []

    def add(x, scale):
        calls.append(scale)
        total.add_(x)
        return (total * scale,)

    with tapes():
        replay = Replay(add, CPU)
        for step in range(1, 6):
            (result,) = replay(torch.full((3,), float(step)), 2.0)
            assert total.tolist() == [sum(range(step + 1))] * 3
            assert result.equal(total * 2)
            if step == 3:
                kept, value = result, result.clone()
        assert kept.equal(value), "a result must not change with the next call"
        assert calls == [2.0, 2.0]
        replay(torch.ones(3), 3.0)
        replay(torch.ones(1), 2.0)  # another shape
        assert calls == [2.0, 2.0, 3.0, 2.0]


def test_random_numbers_go_on_in_replays():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.rand(2), torch.empty(2).normal_(generator=generator)

    expected = [draw() for _ in range(4)]
    torch.manual_seed(0)
    generator.manual_seed(0)
    with tapes():
        replay = Replay(draw, CPU, [generator])
        for pair in expected:
            assert all(map(torch.equal, replay(), pair))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * x.tolist()[0],
        lambda x: x if x[0] > 0 else -x,
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x * torch.tensor(2.0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.rand(3, generator=torch.Generator()),
    ],
    ids=["item", "tolist", "branch", "numpy", "tensor", "mask", "nonzero", "generator"],
)
def test_what_no_graph_can_hold(function):
    with tapes():
        replay = Replay(lambda x: (function(x),), CPU)
        replay(torch.ones(3))
        with pytest.raises(NotCapturable):
            replay(torch.ones(3))


def test_who_gets_a_graph():
    check_graph(False, CPU)
    check_graph(True, torch.device("cuda"))
    with pytest.raises(ValueError, match="cuda_graph must be False for a model on cpu"):
        check_graph(True, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_keeps_what_it_reads():
    device = torch.device("cuda")
    weights = [torch.full((1 << 20,), 2.0, device=device)]
    replay = Replay(lambda x: (x * weights[0],), device)
    ones = torch.ones(1 << 20, device=device)
    for _ in range(2):
        replay(ones)
    weights[0] = torch.zeros(1 << 20, device=device)
    others = [torch.full((1 << 20,), 3.0, device=device) for _ in range(8)]
    assert replay(ones)[0].eq(2).all() and len(others) == 8

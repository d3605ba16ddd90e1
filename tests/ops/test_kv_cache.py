"""What the table of samples does not say of append_kv."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import aigc_fast
from aigc_fast import ops
from tests.op_samples import rand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "backend", [nullcontext, partial(aigc_fast.backend, "reference")], ids=["cpu", "reference"]
)
@pytest.mark.parametrize("positions", [[0, 6], [-1, 0], [3, 2**31], [-(2**40), 0]])
def test_positions_outside_the_cache_are_refused_and_nothing_is_written(backend, positions) -> None:
    new, cache = rand(2, 3, 2, 5), rand(2, 8, 2, 5)
    caches = cache.clone(), cache.clone()
    message = r"positions must lie in \[0, capacity - q_len\] = \[0, 5\], got .* for sequence [01]"
    with pytest.raises(ValueError, match=message), backend():
        ops.append_kv(new, new, *caches, torch.tensor(positions))
    assert torch.equal(caches[0], cache) and torch.equal(caches[1], cache)


def test_a_gpu_drops_tokens_outside_the_cache() -> None:
    new, cache = rand(4, 3, 2, 5).float(), rand(4, 8, 2, 5).float()
    caches = [cache.clone().to(DEVICE) for _ in range(2)]
    positions = torch.tensor([-2, 7, 2, 2**40])
    with aigc_fast.backend("triton"):
        ops.append_kv(*(t.to(DEVICE) for t in (new, new)), *caches, positions.to(DEVICE))
    expected = cache.clone()
    expected[0, 0], expected[1, 7], expected[2, 2:5] = new[0, 2], new[1, 0], new[2]
    assert torch.equal(caches[0].cpu(), expected) and torch.equal(caches[1].cpu(), expected)


@pytest.mark.parametrize(
    "backend", [nullcontext, partial(aigc_fast.backend, "reference")], ids=["cpu", "reference"]
)
@pytest.mark.parametrize("page", [-1, 5, 2**31 - 1, -(2**31)])
def test_pages_that_are_not_there_are_refused_and_nothing_is_written(backend, page) -> None:
    new, cache = rand(2, 3, 2, 5), rand(5, 4, 2, 5)
    caches = cache.clone(), cache.clone()
    table = torch.tensor([[0, 1, page], [2, page, 3]], dtype=torch.int32)
    message = rf"block_table must be in \[0, 5\) .*, got {page} for page 1 of sequence 1"
    with pytest.raises(ValueError, match=message), backend():
        ops.append_kv(new, new, *caches, torch.tensor([4, 2]), block_table=table)
    with pytest.raises(
        ValueError, match=r"positions must lie in \[0, capacity - q_len\] = \[0, 9\]"
    ):
        ops.append_kv(new, new, *caches, torch.tensor([10, 0]), block_table=table)
    assert torch.equal(caches[0], cache) and torch.equal(caches[1], cache)


def test_a_gpu_drops_tokens_outside_the_pages() -> None:
    new, cache = rand(4, 3, 2, 5).float(), rand(3, 4, 2, 5).float()
    caches = [cache.clone().to(DEVICE) for _ in range(2)]
    table = torch.tensor([[0, 9], [1, 1], [-1, 2], [7, 7]], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([-2, 7, 3, 2**40])
    with aigc_fast.backend("triton"):
        ops.append_kv(
            *(t.to(DEVICE) for t in (new, new)), *caches, positions.to(DEVICE), block_table=table
        )
    expected = cache.clone()
    expected[0, 0], expected[1, 3], expected[2, :2] = new[0, 2], new[1, 0], new[2, 1:]
    assert torch.equal(caches[0].cpu(), expected) and torch.equal(caches[1].cpu(), expected)

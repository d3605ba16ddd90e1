"""What the table of samples does not say of append_kv."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import aigc_fast
from aigc_fast import ops
from tests.op_samples import rand
from tests.op_samples.rotary import angles
from tests.ops.test_every_op import DEVICE, IMPLEMENTATIONS, LOW

EVERYWHERE = pytest.mark.parametrize(
    ("implementation", "device"), [("reference", "cpu"), *IMPLEMENTATIONS]
)

NARROW = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
SCALES = ("key_scale", "value_scale")


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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a dtype of one byte, ascending."""
    numbers = torch.arange(-128, 128, dtype=torch.int8).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cache", NARROW, ids=str)
@EVERYWHERE
def test_stores_the_nearest_number(implementation, device, cache, dtype) -> None:
    numbers = every_number(cache)
    middles = (numbers[1:] + numbers[:-1]) / 2
    below, above = (numbers[1:-1] + s * (numbers[2:] - numbers[:-2]) / 9 for s in (-1, 1))
    beyond = torch.tensor([1e4, -1e4, 6e4, -6e4, torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    x = torch.cat([numbers, middles, below, above, beyond]).to(dtype).to(device)
    caches = [torch.zeros(1, 1, 1, len(x)).to(device, cache) for _ in range(2)]
    with aigc_fast.backend(implementation):
        ops.append_kv(x.view_as(caches[0]), x.view_as(caches[0]), *caches,
                      torch.zeros(1, dtype=torch.int32, device=device))  # fmt: skip
    # torch rounds to the nearest too, to even, but saturates nothing.
    largest = numbers.max().item()
    clamped = x.double().cpu().clamp(numbers.min().item(), largest)
    expected = clamped.nan_to_num().round() if cache == torch.int8 else clamped
    for stored in caches:
        got = stored.flatten().cpu().double()
        torch.testing.assert_close(got, expected.to(cache).double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@EVERYWHERE
def test_rotates_as_apply_rotary(implementation, device, dtype, interleaved) -> None:
    packed = rand(2, 3, 6, 24).to(device, dtype)
    key, value = packed[:, :, 2:4], packed[:, :, 4:]
    cos, sin = (t.to(device).float() for t in angles(2, 3, 8))
    positions = torch.tensor([1, 4], device=device)
    fused, apart = ([rand(2, 8, 2, 24).to(device, dtype) for _ in range(2)] for _ in range(2))
    with aigc_fast.backend(implementation):
        ops.append_kv(key, value, *fused, positions, cos=cos, sin=sin, interleaved=interleaved)
        turned = ops.apply_rotary(key, cos, sin, interleaved=interleaved)
        ops.append_kv(turned, value, *apart, positions)
    assert all(map(torch.equal, fused, apart))


@pytest.mark.parametrize("cache", NARROW, ids=str)
@EVERYWHERE
def test_attention_reads_what_was_written(implementation, device, cache) -> None:
    key, value, query = (rand(2, 9, 2, 32, seed=s).to(device).float() for s in range(3))
    scales = {name: torch.tensor([0.04, 0.03], device=device) for name in SCALES}
    caches = [torch.zeros(2, 9, 2, 32, device=device).to(cache) for _ in range(2)]
    lengths = torch.tensor([9, 9], device=device)
    with aigc_fast.backend(implementation):
        ops.append_kv(key, value, *caches, lengths - 9, **scales)
        out = ops.decode_attention(query, *caches, lengths, **scales)
    unit = scales["key_scale"][:, None]
    stored = [c.float() * unit for c in caches]
    # Half a step: of int8 everywhere, of fp8 by 3 or 2 bits of mantissa.
    relative, absolute = {
        torch.int8: (0, 0.5), torch.float8_e4m3fn: (2**-4, 2**-10), torch.float8_e5m2: (2**-3, 0)
    }[cache]  # fmt: skip
    for x, kept in zip((key, value), stored, strict=True):
        assert ((x - kept).abs() <= (relative * x.abs() + absolute * unit) * 1.00001).all()
    torch.testing.assert_close(out, ops.decode_attention(query, *stored, lengths))

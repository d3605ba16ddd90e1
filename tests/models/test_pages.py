"""The pages of a paged cache: shared, evicted, never lost."""

import random
from pathlib import Path

import pytest

from aigc_fast.models.autoregressive import DecoderConfig
from aigc_fast.models.autoregressive.cache import CACHE_DTYPES, allocate
from aigc_fast.models.autoregressive.pages import PagePool


def finish(pool, held, tokens):
    pool.publish(held, tokens)
    pool.release(held)


def test_a_beginning_that_is_known_is_found_again():
    pool = PagePool(10, 4)
    tokens = list(range(11))
    first = pool.acquire(tokens, 14)
    assert len(first.ids) == 4 and not first.shared
    pool.publish(first, tokens)
    second = pool.acquire([*tokens[:9], 99], 12)
    assert second.ids[:2] == first.ids[:2]
    assert len(set(first.ids + second.ids)) == 5
    # The last token has to be computed, so its page is not taken from the known ones.
    assert len(pool.acquire(tokens[:8], 8).shared) == 1


def test_pages_of_ended_sequences_stay_known_until_needed():
    pool = PagePool(4, 2)
    old, new = [1, 2, 3, 4, 5], [6, 7, 8]
    finish(pool, pool.acquire(old, 5), old)
    finish(pool, pool.acquire(new, 3), new)
    assert pool.available == 4
    assert len(pool.acquire(old, 5).shared) == 2  # one page is left, and it is `new`'s
    held = pool.acquire([9], 2)
    assert pool.available == 0 and held is not None
    assert pool.acquire(new, 3) is None


def test_the_last_page_of_what_was_unused_for_longest_goes_first():
    pool = PagePool(4, 1)
    finish(pool, pool.acquire([1, 2], 2), [1, 2])
    finish(pool, pool.acquire([3, 4], 2), [3, 4])
    pool.acquire([5], 1)  # takes the page of 2, then the next one that of 4
    assert len(pool.acquire([1, 2, 0], 2).shared) == 1
    assert len(pool.acquire([3, 4, 0], 1).shared) == 1


def test_what_two_computed_at_once_is_kept_once():
    pool = PagePool(6, 2)
    tokens = [1, 2, 3, 4, 5]
    first, second = pool.acquire(tokens, 5), pool.acquire(tokens, 5)
    pool.publish(first, tokens)
    pool.publish(second, tokens)
    assert first.ids[:2] == second.ids[:2]
    assert pool.available == 2  # the two that were the second's


def test_too_few_pages_change_nothing():
    pool = PagePool(3, 2)
    tokens = [1, 2, 3]
    finish(pool, pool.acquire(tokens, 3), tokens)
    assert pool.acquire(tokens, 9) is None
    assert pool.available == 3
    assert len(pool.acquire(tokens, 6).shared) == 1


def test_no_page_is_lost_or_held_twice_over_many_sequences():
    rng = random.Random(0)
    pool, running = PagePool(20, 3), []
    contents: dict[int, tuple[int, ...]] = {}
    for _ in range(3000):
        if running and rng.random() < 0.5:
            held, tokens = running.pop(rng.randrange(len(running)))
            finish(pool, held, tokens[: rng.randint(0, len(tokens))])
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 15))]
            held = pool.acquire(tokens, len(tokens) + rng.randint(0, 4))
            if held is None:
                continue
            # A shared page holds what its sequence was told it holds.
            for at, node in enumerate(held.shared):
                assert contents[node.page] == tuple(tokens[: 3 * at + 3])
            for at, page in enumerate(held.ids[len(held.shared) :], len(held.shared)):
                contents[page] = tuple(tokens[: 3 * at + 3])
            running.append((held, tokens))
        own = [page for held, _ in running for page in held.own]
        shared = {node.page for held, _ in running for node in held.shared}
        assert len(set(own)) == len(own) and not shared & set(own)
        assert pool.available == 20 - len(own) - len(shared)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        PagePool(*sizes)


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_memory_is_taken_where_it_is_used(dtype):
    config = DecoderConfig(256, 64, 1, 4, 2, 16, 128)
    rows = 2**27 // dtype.itemsize // (16 * 2 * 16)
    before = resident()
    memory = allocate(config, rows, 16, dtype, "cpu")
    assert sum(cache.nbytes for cache in memory) == 2**28
    assert resident() - before < 2**24
    for cache in memory:
        assert cache.dtype == dtype and cache.shape == (rows, 16, 2, 16)
        assert cache.data_ptr() % 64 == 0
        assert cache[:: rows // 7].float().eq(0).all()
    memory[0][-1] = 1
    assert memory[0][-1].float().eq(1).all()

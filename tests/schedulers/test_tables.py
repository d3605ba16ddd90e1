"""Rows are made once for all schedulers of one class, configuration and schedule."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_fast.schedulers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    SASolverScheduler,
    linear,
    tables,
)


@pytest.fixture(autouse=True)
def _nothing_made():
    tables._made.cache_clear()


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """The number of steps of each table that is made."""
    counts: list[int] = []
    make = linear.Row.steps

    def counted(self: linear.Row, count: int, device: Any) -> list:
        counts.append(count)
        return make(self, count, device)

    monkeypatch.setattr(linear.Row, "steps", counted)
    return counts


def loop(scheduler: Any, steps: int | None = None) -> torch.Tensor:
    if steps is not None:
        scheduler.set_timesteps(steps)
    sample = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample.sin(), t, sample)
    return sample


def test_rows_are_found_again(built) -> None:
    scheduler = DDIMScheduler()
    first = loop(scheduler, 5)
    for again in (scheduler, DDIMScheduler(), DDIMScheduler(trained_betas=None)):
        assert torch.equal(loop(again, 5), first)
    assert built == [5]
    loop(scheduler, 4)
    loop(scheduler, 5)
    assert built == [5, 4]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s, "clip_sample_range", 0.5),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2),
        lambda s: s.alphas_cumprod.mul_(0.9),
        lambda s: s.timesteps.sub_(1),
        lambda s: setattr(s, "num_inference_steps", 7),
    ],
)
def test_what_differs_is_made_anew(change, built) -> None:
    plain, changed, alone = (DDIMScheduler() for _ in range(3))
    first = loop(plain, 5)
    for scheduler in (changed, alone):
        scheduler.set_timesteps(5)
        change(scheduler)
    got = loop(changed)
    assert built == [5, 5] and not torch.equal(got, first)
    tables._made.cache_clear()
    assert torch.equal(got, loop(alone))
    assert torch.equal(first, loop(plain, 5))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s, "clip_sample_range", 0.05),
        lambda s: s.alphas_cumprod.mul_(0.9),
    ],
)
def test_a_change_in_the_middle_of_a_loop_reaches_no_other_scheduler(change) -> None:
    sample = torch.linspace(-1, 1, 12).reshape(1, 3, 4)

    def last(scheduler: Any) -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        return scheduler.step(sample, scheduler.timesteps[2], sample, seed, eta=1.0)

    plain, changed, later = (DDIMScheduler() for _ in range(3))
    for scheduler in (plain, changed, later):
        scheduler.set_timesteps(5)
    want = last(plain)
    tables._made.cache_clear()
    changed.step(sample, changed.timesteps[0], sample)  # other rows than those of eta=1
    change(changed)
    assert not torch.equal(last(changed), want)
    assert torch.equal(last(later), want)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (DDIMScheduler, lambda s: s.alphas_cumprod.mul_(0.9)),
        (DDIMScheduler, lambda s: s.timesteps.add_(1)),
        (DDIMScheduler, lambda s: setattr(s, "timesteps", s.timesteps + 1)),
        (DDIMScheduler, lambda s: s.timesteps.copy_(s.timesteps.flip(0))),
        (EulerDiscreteScheduler, lambda s: s.sigmas.mul_(0.9)),
        (KDPM2AncestralDiscreteScheduler, lambda s: s.sigmas_interpol.mul_(0.9)),
        (KDPM2AncestralDiscreteScheduler, lambda s: s.sigmas.mul_(0.9)),
        (KDPM2AncestralDiscreteScheduler, lambda s: s.sigmas_up.mul_(0.9)),
        (KDPM2AncestralDiscreteScheduler, lambda s: s.sigmas_down.mul_(0.9)),
        (IPNDMScheduler, lambda s: s.betas.mul_(0.9)),
    ],
)
def test_a_change_in_place_after_steps_is_seen(cls, change, inference) -> None:
    """Also by the step itself: rows that are made already are not found."""
    with torch.inference_mode(inference):
        used, fresh = cls(), cls()
        first = loop(used, 4)
        fresh.set_timesteps(4)
        for scheduler in (used, fresh):
            change(scheduler)
            torch.manual_seed(0)
            scheduler.set_begin_index(0)
        got = loop(used)
        torch.manual_seed(0)
        tables._made.cache_clear()
        assert torch.equal(got, loop(fresh)) and not torch.equal(got, first)


def test_levels_of_training_follow_a_change_in_place() -> None:
    used, fresh = DDIMScheduler(), DDIMScheduler()
    x, noise, at = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([3, 700])
    first = used.add_noise(x, noise, at)
    for scheduler in (used, fresh):
        scheduler.alphas_cumprod.mul_(0.9)
    got = used.add_noise(x, noise, at)
    assert torch.equal(got, fresh.add_noise(x, noise, at)) and not torch.equal(got, first)


def test_a_class_and_a_function_are_told_apart(built) -> None:
    loop(SASolverScheduler(tau_func=lambda t: 0.0), 3)
    count = len(built)
    loop(SASolverScheduler(tau_func=lambda t: 0.5), 3)
    assert len(built) == 2 * count


def test_in_place_changes_of_a_list_of_the_configuration(built) -> None:
    betas = [0.1, 0.2, 0.3, 0.4]
    scheduler = DDIMScheduler(num_train_timesteps=4, trained_betas=betas)
    loop(scheduler, 2)
    betas[0] = 0.15
    loop(DDIMScheduler(num_train_timesteps=4, trained_betas=betas), 2)
    assert built == [2, 2]


def test_copies_find_the_same_rows(built) -> None:
    scheduler = DDIMScheduler()
    first = loop(scheduler, 5)
    for other in (copy.deepcopy(scheduler), copy.copy(scheduler),
                  pickle.loads(pickle.dumps(scheduler))):  # fmt: skip
        other.set_begin_index(0)
        assert torch.equal(loop(other), first)
    assert built == [5]


def test_what_is_made_in_inference_mode_serves_where_gradients_are_wanted() -> None:
    with torch.inference_mode():
        loop(EulerDiscreteScheduler(), 3)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(2, 3, requires_grad=True)
    scheduler.step(x.sin(), scheduler.timesteps[0], x).sum().backward()
    assert x.grad is not None


def test_what_runs_in_a_mode_has_rows_of_its_own() -> None:
    """They may be fake."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        loop(DDIMScheduler(), 3)
    assert tables._made.cache_info().currsize == 0


def test_few_schedules_are_kept() -> None:
    for steps in range(1, 100):
        loop(DDIMScheduler(), steps)
    assert tables._made.cache_info().currsize <= 64


def test_a_schedule_that_cannot_be_read_has_rows_of_its_own() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.bfloat16()  # which numpy has not
    loop(scheduler)
    scheduler.tau_func = []  # which has no hash
    scheduler.set_timesteps(3)
    loop(scheduler)
    assert tables._made.cache_info().currsize == 0


def test_rows_of_one_loop_are_made_together() -> None:
    """Step `index` finds those for its history, wherever the loop began."""
    for most in (1, 2, 3):
        for index in range(6):
            for history in range(most + 1):
                start = linear.began(index, history, most)
                assert linear.histories(index + 1, start, most)[index] == history
    assert {linear.began(i, min(i, 3), 3) for i in range(9)} == {0}

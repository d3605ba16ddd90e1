"""`install(exact=True)`: the bits of diffusers' own classes, and what they leave in a scheduler."""

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.schedulers.test_against_diffusers import CASES, OF_STEP, THRESHOLD, model

diffusers = pytest.importorskip("diffusers")
integration = pytest.importorskip("aigc_fast.integrations.diffusers")
exact = pytest.importorskip("aigc_fast.integrations.diffusers_exact")
plan = pytest.importorskip("aigc_fast.integrations.diffusers_plan")

SHAPE = (2, 3, 5, 7)
USUAL = {"PNDMScheduler": {"skip_prk_steps": True}}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _uninstalled():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    exact._plans.cache_clear()
    yield
    integration.uninstall()


@pytest.fixture
def replays(monkeypatch):
    """What has been replayed."""
    found: list[Any] = []
    replay = plan.Plan.replay
    monkeypatch.setattr(plan.Plan, "replay", lambda *args: found.append(1) or replay(*args))
    return found


def make(name: str, config: dict[str, Any] | None = None) -> Any:
    config = config or USUAL.get(name, {})
    if name.startswith("LMSDiscrete") or config.get("use_beta_sigmas"):
        pytest.importorskip("scipy")
    own = {k: v for k, v in config.items() if k not in OF_STEP and k != "mu"}
    return getattr(diffusers, name if name.endswith("Scheduler") else f"{name}Scheduler")(**own)


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype and got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    elif isinstance(want, int | float | str | None):
        assert got == want


def snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return [snapshot(member) for member in value]
    return {k: snapshot(v) for k, v in value.items()} if isinstance(value, dict) else value


def loop(
    scheduler: Any,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    *,
    steps: int = 7,
    shape: tuple[int, ...] = SHAPE,
    seed: int | None = 0,
    begin: int = 0,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    between: Callable[[Any], Any] = lambda scheduler: scheduler,
    **options: Any,
) -> list[Any]:
    """Results and states of all steps; without a seed noise is that of torch's own generator."""
    config = config or {}
    scheduler.set_timesteps(steps, **{k: v for k, v in config.items() if k == "mu"})
    options |= {k: v for k, v in config.items() if k in OF_STEP}
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(3)
    if seed is not None and "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    sample = layout(torch.randn(shape, generator=generator).to(dtype))
    found = []
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        output = layout(model(sample.float(), t, config).to(dtype))
        result = scheduler.step(output, t, sample, **options)
        sample = result[0]
        found.append((result, snapshot(vars(scheduler)), generator.get_state()))
        scheduler = between(scheduler)
    found.append(torch.get_rng_state())
    return found


def compare(name: str, *args: Any, replays: list, config: Any = None, **kwargs: Any) -> int:
    """Compares two loops of one scheduler, and one of another, with stock ones. How many steps of
    the last loop were not replayed."""
    integration.uninstall()
    stock = make(name, config)
    want = [loop(stock, *args, config=config, **kwargs) for _ in range(2)]
    integration.install(exact=True)
    ours = make(name, config)
    assert_same([loop(ours, *args, config=config, **kwargs) for _ in range(2)], want)
    replays.clear()
    assert_same(loop(make(name, config), *args, config=config, **kwargs), want[0])
    return len(want[0]) - 1 - len(replays)


def stays_stock(name: str, config: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether some steps are no rows of elementwise operators, as the text of install says."""
    return (
        config.get("thresholding", False)
        or "learned" in config.get("variance_type", "")
        or (name == "UniPCMultistep" and config.get("solver_order", 2) > 2)
        or (name.startswith("FlowMatch") and dtype == torch.float64)
        or (name == "PNDM" and not config.get("skip_prk_steps", False))
    )


@pytest.mark.parametrize(
    ("name", "config", "steps", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}")
        for i, case in enumerate(CASES)
        for dtype in ([DTYPES[i % 3]] if case.values[1] else (*DTYPES, torch.float64))
    ],
)
def test_bits_and_state(name, config, steps, dtype, replays) -> None:
    missed = compare(name, dtype, config=config, steps=steps, replays=replays)
    assert bool(missed) == stays_stock(name, config, dtype)


NAMES = list(integration.FUSED)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 7, 9), (1, 1, 5, 13), (2, 4, 33, 41)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name, shape, replays) -> None:
    for dtype in DTYPES:
        compare(name, dtype, shape=shape, replays=replays)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "half": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name, layout, replays) -> None:
    compare(name, torch.bfloat16, layout=LAYOUTS[layout], replays=replays)


@pytest.mark.parametrize("name", NAMES)
def test_options_of_a_loop(name, replays) -> None:
    missed = [
        compare(name, seed=None, replays=replays),
        compare(name, return_dict=False, replays=replays),
        compare(name, between=copy.deepcopy, replays=replays),
    ]
    if name != "SASolverScheduler":  # whose default is a lambda
        missed.append(
            compare(name, between=lambda s: pickle.loads(pickle.dumps(s)), replays=replays)
        )
    with torch.inference_mode():
        missed.append(compare(name, replays=replays))
    assert not any(missed)


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_that_begins_late(name, replays) -> None:
    if not hasattr(make(name), "set_begin_index"):
        pytest.skip("it has no begin index")
    assert not compare(name, begin=2, replays=replays)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_stock_method(name, replays) -> None:
    found = []
    for install in (integration.uninstall, lambda: integration.install(exact=True)):
        install()
        for _ in range(2):
            scheduler = make(name)
            scheduler.set_timesteps(4)
            t = scheduler.timesteps[0]
            x = torch.ones(SHAPE, requires_grad=True)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x.detach(), t)
            torch.manual_seed(0)
            result = scheduler.step(x.tanh(), t, x, return_dict=False)[0]
            found.append(torch.autograd.grad(result.sum(), x)[0])
    assert_same(found[1:], found[:1] * 3)
    assert not replays


def test_options_of_a_step_are_kept_apart(replays) -> None:
    integration.install(exact=True)
    scheduler = make("DDIM")
    scheduler.set_timesteps(4)
    x, t = torch.randn(SHAPE), scheduler.timesteps[1]
    noise = torch.randn(2, *SHAPE)
    calls = [{}, {"eta": 1.0, "variance_noise": noise[0]}, {"eta": 0.5, "variance_noise": noise[1]}]
    calls += [{"eta": 0.5, "variance_noise": noise[0]}, {"use_clipped_model_output": True}]
    got = [scheduler.step(x, t, x, **options) for options in calls * 2]
    positional = scheduler.step(x, t, x, 0.5, False, None, noise[1])
    assert len(replays) == len(calls) + 1
    integration.uninstall()
    want = [scheduler.step(x, t, x, **options) for options in calls * 2]
    assert_same(got, want)
    assert_same(positional, want[2])


def test_one_tensor_in_two_roles(replays) -> None:
    scheduler = make("DDIM")
    scheduler.set_timesteps(4)
    x, y, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[1]
    want = [scheduler.step(a, t, b) for a, b in ((x, x), (x, y), (y, y), (x, y))]
    integration.install(exact=True)
    got = [scheduler.step(a, t, b) for a, b in ((x, x), (x, y), (y, y), (x, y))]
    assert_same(got, want)
    assert len(replays) == 2


def test_a_changed_schedule_is_seen(replays) -> None:
    """Whether it is another tensor or the same with other numbers, and plain attributes too."""

    def run(scheduler: Any) -> list[Any]:
        x, results = torch.ones(SHAPE), []
        for change in (
            lambda s: None,
            lambda s: s.sigmas.mul_(0.9),
            lambda s: setattr(s, "sigmas", s.sigmas * 0.5),
            lambda s: setattr(s, "lambda_t", s.lambda_t + 1),
            lambda s: setattr(s, "predict_x0", True),
        ):
            for _ in range(2):
                scheduler.set_timesteps(3)
                change(scheduler)
                for t in scheduler.timesteps:
                    x = scheduler.step(torch.tanh(x), t, x).prev_sample
                    results.append(x)
        return results

    want = run(make("UniPCMultistep"))
    integration.install(exact=True)
    assert_same(run(make("UniPCMultistep")), want)
    assert replays


def test_noise_of_a_list_of_generators(replays) -> None:
    def run(scheduler: Any) -> list[Any]:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        scheduler.set_timesteps(3)
        x = torch.ones(SHAPE)
        return [scheduler.step(x, t, x, generator=generators) for t in scheduler.timesteps]

    want = run(make("DDPM"))
    integration.install(exact=True)
    assert_same([run(make("DDPM")) for _ in range(2)], [want] * 2)
    assert not replays


def test_stock_errors_stay() -> None:
    integration.install(exact=True)
    x = torch.randn(SHAPE)
    for _ in range(2):
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            diffusers.DDIMScheduler().step(x, 1, x)
        euler = make("EulerDiscrete")
        euler.set_timesteps(3)
        with pytest.raises(ValueError, match="integer indices"):
            euler.step(x, 3, x)
        inverse = make("DDIMInverse")
        inverse.set_timesteps(3)
        with pytest.raises(TypeError, match="generator"):
            inverse.step(x, inverse.timesteps[0], x, generator=torch.Generator())


def test_what_is_not_elementwise_stays_stock(replays) -> None:
    assert compare("DDIM", config=THRESHOLD, replays=replays) == 7


def test_what_the_fast_step_keeps_does_not_matter(replays) -> None:
    integration.install(exact=True)
    loop(make("DDIM"))
    scheduler = make("DDIM")
    integration.install()
    loop(scheduler)
    integration.install(exact=True)
    for _ in range(2):
        replays.clear()
        loop(scheduler)
    assert len(replays) == 7


def test_one_contract_replaces_the_other() -> None:
    cls = diffusers.DDIMScheduler
    stock = vars(cls)["step"]
    names = integration.install()
    fast = vars(cls)["step"]
    assert integration.install(exact=True) == names
    assert vars(cls)["step"] not in (stock, fast)
    assert inspect.signature(cls.step) == inspect.signature(stock)
    integration.install()
    assert vars(cls)["step"].__code__ is fast.__code__
    integration.uninstall()
    assert vars(cls)["step"] is stock

"""diffusers' own classes with the fused methods in them, beside the stock ones."""

import copy
import inspect
import logging

import pytest
import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast.schedulers import linear

diffusers = pytest.importorskip("diffusers")
integration = pytest.importorskip("aigc_fast.integrations.diffusers")

SHAPE = (2, 3, 8, 9)
STATE = ("step_index", "begin_index", "lower_order_nums", "this_order", "counter", "timestep_list",
         "num_inference_steps", "timesteps", "sigmas")  # fmt: skip
TENSORS = ("model_outputs", "ets", "derivatives", "last_sample", "cur_sample")


@pytest.fixture(autouse=True)
def _uninstalled():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    yield
    integration.uninstall()


@pytest.fixture
def calls(monkeypatch):
    """How often the fused step ran."""
    count = []

    def counted(step):
        return lambda *a, **k: count.append(1) or step(*a, **k)

    monkeypatch.setattr(ops, "scheduler_step", counted(ops.scheduler_step))
    for name in ("_scheduler_step", "_scheduler_step_both", "_scheduler_step_full"):
        monkeypatch.setattr(linear, name, counted(getattr(linear, name)))
    return count


def make(name: str, **config):
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(6)
    return scheduler


def loop(scheduler, dtype, states: list) -> list:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator).to(dtype)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    outputs = []
    for t in scheduler.timesteps:
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, t)
        out = scheduler.step(scaled / (1 + scaled.abs()), t, sample, **options)
        outputs.append(dict(out))
        sample = out.prev_sample
        states.append({k: copy.copy(getattr(scheduler, k)) for k in STATE if k in vars(scheduler)
                       or (k == "step_index" and hasattr(scheduler, k))})  # fmt: skip
        states[-1] |= {k: copy.copy(vars(scheduler)[k]) for k in TENSORS if k in vars(scheduler)}
    return outputs


def flat(values) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [t for value in values for t in flat(value)]
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", integration.FUSED)
def test_outputs_and_state_are_those_of_the_stock_class(name, dtype, calls) -> None:
    stock, fused = make(name), make(name)
    cls = type(stock)
    signature = inspect.signature(cls.step)
    stock_states: list = []
    fused_states: list = []
    want = loop(stock, dtype, stock_states)
    assert not calls
    assert name in integration.install()
    assert type(fused) is cls and inspect.signature(cls.step) == signature
    with torch.set_grad_enabled(dtype == torch.float32):
        got = loop(fused, dtype, fused_states)
    assert len(calls) == len(got)
    for a, b in zip(want, got, strict=True):
        assert list(a) == list(b)
        for key in a:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
            # Both round; test_against_diffusers holds the exact errors to the library's rule.
            close = 1e-5 if dtype == torch.float32 else 0.05
            assert (a[key] - b[key]).abs().mean() <= close * max(v.abs().mean() for v in a.values())
    for a, b in zip(stock_states, fused_states, strict=True):
        assert set(a) == set(b)
        for key in a:
            x, y = flat(a[key]), flat(b[key])
            assert [t.shape for t in x] == [t.shape for t in y], key
            assert [t.dtype for t in x] == [t.dtype for t in y], key
            if not x:
                assert a[key] == b[key], key
    assert fused.config == stock.config


def test_uninstall_gives_the_methods_back() -> None:
    cls = diffusers.DDIMScheduler
    before = {name: vars(cls)[name] for name in ("step", "add_noise", "get_velocity")}
    integration.install()
    integration.install()
    assert vars(cls)["step"] is not before["step"]
    integration.uninstall()
    integration.uninstall()
    assert all(vars(cls)[name] is method for name, method in before.items())


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                                  "PNDMScheduler", "SASolverScheduler"])  # fmt: skip
def test_install_in_the_middle_of_a_loop(name) -> None:
    """The history is diffusers' own: it does not matter which step wrote it."""
    stock, mixed = make(name), make(name)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    a = b = x
    for i, t in enumerate(stock.timesteps):
        options = [{}, {}]
        if "generator" in inspect.signature(stock.step).parameters:
            options = [{"generator": torch.Generator().manual_seed(i)} for _ in range(2)]
        integration.uninstall()
        a = stock.step(torch.tanh(a), t, a, **options[0]).prev_sample
        if i % 3:
            integration.install()
        b = mixed.step(torch.tanh(b), t, b, **options[1]).prev_sample
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_custom_timesteps_of_a_consistency_model() -> None:
    """With a list of timesteps diffusers sets no number of steps: those run the stock method."""
    results = []
    for install in (integration.uninstall, integration.install):
        install()
        scheduler = diffusers.CMStochasticIterativeScheduler()
        scheduler.set_timesteps(timesteps=[39, 22, 0])
        generator, x = torch.Generator().manual_seed(4), torch.ones(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, generator).prev_sample
        results.append(x)
    torch.testing.assert_close(*results)


def test_positional_arguments_and_tuples() -> None:
    scheduler = make("DDIMScheduler")
    x = torch.randn(SHAPE)
    args = (x, scheduler.timesteps[1], x, 0.5, True)
    want = scheduler.step(*args, generator=torch.Generator().manual_seed(3), return_dict=False)
    integration.install()
    got = scheduler.step(*args, torch.Generator().manual_seed(3), None, False)
    assert isinstance(got, tuple)
    torch.testing.assert_close(got, want)


def test_stock_errors_stay() -> None:
    integration.install()
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        diffusers.DDIMScheduler().step(x, 1, x)
    euler = make("EulerDiscreteScheduler")
    with pytest.raises(ValueError, match="integer indices"):
        euler.step(x, 3, x)
    with pytest.raises(ValueError, match="prediction_type"):
        make("DDIMScheduler", prediction_type="score").step(x, 0, x)
    with pytest.raises(NotImplementedError, match="sample"):
        ancestral = make("EulerAncestralDiscreteScheduler", prediction_type="sample")
        ancestral.scale_model_input(x, ancestral.timesteps[0])
        ancestral.step(x, ancestral.timesteps[0], x)
    with pytest.raises(IndexError):
        make("DDPMScheduler").step(x, 3, x)
    with pytest.raises(RuntimeError):
        ddim = make("DDIMScheduler")
        ddim.step(x[:, :2], ddim.timesteps[0], x)


def test_a_changed_schedule_is_seen() -> None:
    """The rows belong to the tensors they were made of."""
    integration.install()
    scheduler = make("DPMSolverMultistepScheduler")
    x = torch.randn(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(3)
    scheduler.sigmas = scheduler.sigmas * 0.5
    got = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    integration.uninstall()
    scheduler.set_timesteps(3)
    scheduler.sigmas = scheduler.sigmas * 0.5
    want = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("DDIMScheduler", "alphas_cumprod"),
        ("EulerDiscreteScheduler", "sigmas"),
        ("KDPM2DiscreteScheduler", "sigmas_interpol"),
        ("IPNDMScheduler", "betas"),
    ],
)
def test_a_schedule_changed_in_place_in_the_middle_of_a_loop_is_seen(name, tensor) -> None:
    stock, fused = make(name), make(name)
    results: list[list[Tensor]] = []
    for scheduler in (stock, fused):
        x, samples = torch.ones(SHAPE), []
        for i, t in enumerate(scheduler.timesteps):
            if i == 3:
                getattr(scheduler, tensor).mul_(0.9)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
            samples.append(x)
        results.append(samples)
        integration.install()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_sample_changed_between_two_steps_is_seen(name, in_place) -> None:
    """These take less memory traffic where a sample is what the step before returned."""
    stock, fused = make(name), make(name)
    results: list[list[Tensor]] = []
    for scheduler in (stock, fused):
        x, samples = torch.ones(SHAPE), []
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
            samples.append(x.clone())
            x = x.mul_(0.7) if in_place else x * 0.7
        results.append(samples)
        integration.install()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, how in integration.FUSED.items() if how.noise_levels]
)
def test_noise(name) -> None:
    scheduler = make(name)
    x, z = torch.randn(2, *SHAPE)
    for begin in (None, 2):
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        for timesteps in (scheduler.timesteps[[1, 4]], scheduler.timesteps[2:3]):
            if len(timesteps) == 1 and timesteps.is_floating_point():
                continue
            methods = [m for m in ("add_noise", "scale_noise", "get_velocity")
                       if hasattr(scheduler, m)]  # fmt: skip
            for method in methods:
                args = (x, timesteps, z) if method == "scale_noise" else (x, z, timesteps)
                integration.uninstall()
                plain = getattr(scheduler, method)(*args)
                exact = getattr(scheduler, method)(
                    *(a.double() if a is x or a is z else a for a in args)
                )
                integration.install()
                got = getattr(scheduler, method)(*args)
                # A level is rounded once more in fp32 than where it meets float64.
                if exact.dtype == torch.float64 and torch.equal(plain, got):
                    continue
                torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


def test_gradients_flow() -> None:
    integration.install()
    scheduler = make("DDIMScheduler", clip_sample=False)
    x = torch.randn(SHAPE, requires_grad=True)
    t = scheduler.timesteps[1]
    (got,) = torch.autograd.grad(scheduler.step(x.sin(), t, x).prev_sample.sum(), x)
    integration.uninstall()
    (want,) = torch.autograd.grad(scheduler.step(x.sin(), t, x).prev_sample.sum(), x)
    torch.testing.assert_close(got, want)

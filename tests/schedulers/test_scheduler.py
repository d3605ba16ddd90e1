"""The loop of the schedulers: order, history, guidance, refusals."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_fast import ops, schedulers
from aigc_fast.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    Scheduler,
    UniPCMultistepScheduler,
)

ALL = [
    cls
    for cls in (getattr(schedulers, name) for name in schedulers.__all__)
    if isinstance(cls, type) and issubclass(cls, Scheduler) and cls is not Scheduler
]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.name())
        return func(*args, **(kwargs or {}))


def run(scheduler, steps=6, start=0):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 3, 4, 5, generator=generator)
    for t in scheduler.timesteps.tolist()[start:steps]:
        sample = scheduler.step(torch.sin(sample), t, sample, generator)
    return sample


@pytest.mark.parametrize("cls", ALL)
def test_a_step_is_one_operator_and_reads_no_scalar(cls) -> None:
    """Once the first loop has made the rows."""
    scheduler = cls()
    scheduler.set_timesteps(5)
    sample = torch.randn(2, 3, 4, 5)
    for _ in range(2):
        scheduler.set_begin_index(0)
        recorders = []
        for t in scheduler.timesteps.tolist():
            with Recorder() as recorder:
                sample = scheduler.step(sample, t, sample)
            recorders.append(recorder)
    for recorder in recorders:
        (name,) = [n for n in recorder.called if not n.startswith("aten::randn")]
        assert name.removeprefix("aigc_fast::scheduler_step") in ("", "_both", "_full")


@pytest.mark.parametrize("cls", ALL)
def test_timesteps_on_another_device_are_not_read(cls) -> None:
    """As on a GPU: the steps are taken in order."""
    scheduler = cls()
    scheduler.set_timesteps(6)
    want = run(scheduler)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 3, 4, 5, generator=generator)
    for t in scheduler.timesteps[:6].to("meta"):
        sample = scheduler.step(torch.sin(sample), t, sample, generator)
    assert torch.equal(sample, want)


@pytest.mark.parametrize("cls", ALL)
def test_runs_again_without_set_timesteps(cls) -> None:
    scheduler = cls()
    scheduler.set_timesteps(6)
    first = run(scheduler)
    run(scheduler, 3)  # breaks off
    assert torch.equal(run(scheduler), first)


def test_history_starts_anew_in_the_middle() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(6)
    middle = run(scheduler, start=3)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    assert torch.equal(run(scheduler, start=3), middle)


def test_a_loop_begins_with_a_whole_runge_kutta_step() -> None:
    scheduler, x = PNDMScheduler(), torch.randn(2, 3)
    scheduler.set_timesteps(8)
    samples = [x]
    for t in scheduler.timesteps.tolist():
        samples.append(scheduler.step(samples[-1].sin(), t, samples[-1]))
    for begin in (4, 8):
        scheduler.set_begin_index(begin)
        x = samples[begin]
        for t in scheduler.timesteps.tolist()[begin:12]:
            x = scheduler.step(x.sin(), t, x)
        assert torch.equal(x, samples[12])
    for begin in (1, 6, 11):
        with pytest.raises(ValueError, match=f"begin_index must be 0, 4, 8, or .* got {begin}"):
            scheduler.set_begin_index(begin)
        scheduler.set_begin_index(0)
        with pytest.raises(ValueError, match="begin_index must be 0, 4, 8, or"):
            scheduler.step(x, scheduler.timesteps[begin] + 0, x)
    plms = PNDMScheduler(skip_prk_steps=True)
    plms.set_timesteps(8)
    plms.set_begin_index(3)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_a_timestep_for_each_sample(cls) -> None:
    scheduler = cls(**({"eta": 0.5} if cls is DDIMScheduler else {}))
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 3, 4, 5)
    timesteps = scheduler.timesteps[[2, 9, 5]]
    together = scheduler.step(output, timesteps, sample, torch.Generator().manual_seed(1))
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(timesteps.tolist()):
        row = type(scheduler).rows(scheduler).table(10)[scheduler.timesteps.tolist().index(t)]
        alone = ops.scheduler_step(sample[i], output[i], row, noise=noise[i])
        torch.testing.assert_close(together[i], alone)


@pytest.mark.parametrize("cls", ALL)
def test_guidance_in_the_step(cls) -> None:
    guided, plain = cls(), cls()
    sample, cond, uncond = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64)
    for scheduler in (guided, plain):
        scheduler.set_timesteps(4)
    for t in plain.timesteps.tolist():
        generators = [torch.Generator().manual_seed(int(abs(1000 * t))) for _ in range(2)]
        a, a_x0 = guided.step(
            cond, t, sample, generators[0],
            uncond_output=uncond, guidance_scale=3.0, return_x0=True,
        )  # fmt: skip
        output = uncond + 3.0 * (cond - uncond)
        b, b_x0 = plain.step(output, t, sample, generators[1], return_x0=True)
        torch.testing.assert_close((a, a_x0), (b, b_x0))


def test_gradients_flow_through_a_trajectory() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(3)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def final(weight):
        sample = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        for t in scheduler.timesteps.tolist():
            sample = scheduler.step(torch.tanh(weight * sample), t, sample)
        return sample

    assert torch.autograd.gradcheck(final, weight)


def test_refusals() -> None:
    x = torch.randn(2, 3)
    scheduler = DDIMScheduler()
    for timestep in (1, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="DDIMScheduler has no timesteps: call set_timesteps"):
            scheduler.step(x, timestep, x)
    scheduler.set_timesteps(4)
    for timestep in (3, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 750]), [3.0]):
        timestep = torch.tensor(timestep) if isinstance(timestep, list) else timestep
        with pytest.raises(ValueError, match="must be one of the 4 of set_timesteps, got 3"):
            scheduler.step(x, timestep, x)
    for wrong in (-250, 1000):  # from the end, or behind it
        with pytest.raises(ValueError, match=f"of set_timesteps, got {wrong}"):
            scheduler.step(x, torch.tensor([wrong]), x)
    assert torch.equal(scheduler.step(x, torch.tensor([750.0, 500.0]), x),
                       scheduler.step(x, torch.tensor([750, 500]), x))  # fmt: skip
    with pytest.raises(ValueError, match=r"num_inference_steps must be in \[1, 1000\], got 0"):
        scheduler.set_timesteps(0)
    for wrong in ({"prediction_type": "score"}, {"timestep_spacing": "random"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            DDIMScheduler(**wrong)
    with pytest.raises(NotImplementedError, match="beta_schedule must be"):
        DDIMScheduler(beta_schedule="cosine")
    with pytest.raises(ValueError, match="solver_order must be one of 1, 2, 3, got 4"):
        DPMSolverMultistepScheduler(solver_order=4)
    with pytest.raises(NotImplementedError, match="algorithm_type must be one of"):
        DPMSolverMultistepScheduler(algorithm_type="unipc")
    with pytest.raises(ValueError, match="final_sigmas_type must be sigma_min"):
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver")
    with pytest.raises(ValueError, match="only one spacing of the sigmas"):
        LMSDiscreteScheduler(use_karras_sigmas=True, use_exponential_sigmas=True)
    with pytest.raises(ValueError, match="variance_type must be one of"):
        DDPMScheduler(variance_type="large")


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
@pytest.mark.parametrize("empty", [[], torch.empty(0), np.array([])], ids=type)
@pytest.mark.parametrize("cls", ALL)
def test_empty_lists_are_refused(cls, name, empty) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be empty"):
        cls().set_timesteps(**{name: empty})


def test_refused_lists_and_arguments() -> None:
    with pytest.raises(ValueError, match="sigmas must be at least two, got one"):
        EulerDiscreteScheduler().set_timesteps(sigmas=[1.0])
    with pytest.raises(ValueError, match="timesteps must be in descending order"):
        DDPMScheduler().set_timesteps(timesteps=[10, 20, 5])
    with pytest.raises(ValueError, match="timesteps must start before 1000, got 1000"):
        DDPMScheduler().set_timesteps(timesteps=[1000, 5])
    with pytest.raises(ValueError, match="either num_inference_steps or a list"):
        DDPMScheduler().set_timesteps()
    with pytest.raises(ValueError, match="either num_inference_steps or a list"):
        DDPMScheduler().set_timesteps(3, timesteps=[9, 5, 1])
    with pytest.raises(TypeError, match=r"DDIMScheduler.set_timesteps: .*'timesteps'"):
        DDIMScheduler().set_timesteps(timesteps=[9, 5, 1])
    for wrong in (1.5, "4"):
        with pytest.raises(TypeError, match="num_inference_steps must be an integer, got"):
            DDPMScheduler().set_timesteps(wrong)
    with pytest.raises(ValueError, match="must be at least 4 without skip_prk_steps, got 3"):
        PNDMScheduler().set_timesteps(3)
    with pytest.raises(ValueError, match="mu must be given"):
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(4)
    with pytest.raises(ValueError, match="of one length, got"):
        FlowMatchEulerDiscreteScheduler().set_timesteps(sigmas=[0.9, 0.5], timesteps=[900.0])
    with pytest.raises(ValueError, match=r"of one length, got \[2, 3\]"):
        FlowMatchEulerDiscreteScheduler().set_timesteps(3, sigmas=[0.9, 0.5])
    for scheduler in (DPMSolverMultistepScheduler(), SASolverScheduler()):
        with pytest.raises(AssertionError, match="mu is for use_dynamic_shifting"):
            scheduler.set_timesteps(3, mu=0.5)
    with pytest.raises(ValueError, match="timesteps cannot be given with karras"):
        DPMSolverMultistepScheduler(use_karras_sigmas=True).set_timesteps(timesteps=[9, 5])
    with pytest.raises(TypeError, match="num_steps"):
        UniPCMultistepScheduler.from_config({"solver_order": 3}, num_steps=3)


def test_sigmas_that_would_be_nan_are_refused() -> None:
    scheduler = KDPM2AncestralDiscreteScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="num_inference_steps must be other than 5"):
        scheduler.set_timesteps(5)


def test_a_list_beside_its_length() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2, sigmas=[0.9, 0.5])
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.0])
    several, alone = EDMEulerScheduler(), EDMEulerScheduler()
    several.set_timesteps(3, sigmas=[0.0, 0.4, 1.0])
    alone.set_timesteps(sigmas=[0.0, 0.4, 1.0])
    assert torch.equal(several.sigmas, alone.sigmas)
    with pytest.raises(ValueError, match=r"of one length, got \[2, 3\]"):
        several.set_timesteps(2, sigmas=[0.0, 0.4, 1.0])
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True)
    scheduler.set_timesteps(2, sigmas=[0.9, 0.5])
    assert scheduler.sigmas[:2].tolist() == pytest.approx([0.9, 0.5])


def test_ddpm_runs_without_set_timesteps() -> None:
    """Through all timesteps of training, as diffusers'."""
    scheduler, x = DDPMScheduler(), torch.randn(2, 3)
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    got = scheduler.step(x, 700, x, noise[0])
    scheduler.set_timesteps(1000)
    assert torch.equal(got, scheduler.step(x, 700, x, noise[1]))


@pytest.mark.parametrize("cls", ALL)
def test_refused_samples(cls) -> None:
    scheduler = cls()
    scheduler.set_timesteps(4)
    t, x = scheduler.timesteps[0], torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match="model_output must have shape"):
        scheduler.step(x[:, :2] if cls is not DDPMScheduler else x[:1], t, x)
    scheduler.set_begin_index(0)
    with pytest.raises(ValueError, match="model_output must be on"):
        scheduler.step(torch.empty_like(x, device="meta"), t, x)
    scheduler.set_begin_index(0)
    with pytest.raises(TypeError, match="model_output must have the dtype"):
        scheduler.step(x.double(), t, x)


def test_a_file_that_holds_no_configuration_is_named(tmp_path) -> None:
    path = tmp_path / "scheduler_config.json"
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        DDIMScheduler.from_pretrained(tmp_path)
    for text, message in (("{", "not JSON"), ("[1]", "must hold a JSON object, got list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"scheduler_config.json: {message}"):
            DDIMScheduler.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="config must be a dict, a scheduler or a path, got list"):
        DDIMScheduler.from_config([])
    with pytest.raises(TypeError, match="of each scheduler class, not of Scheduler"):
        Scheduler.from_config({})


def test_unknown_arguments_of_a_configuration_are_named(caplog) -> None:
    DDIMScheduler.from_config({"eta": 0.5, "solver_order": 3, "num_steps": 7, "_class_name": "X"})
    assert "num_steps" in caplog.text and "solver_order" not in caplog.text


def test_a_configuration_of_another_class() -> None:
    """As in diffusers: what that class was left to choose, this one chooses anew."""
    config = {"beta_end": 0.03, "timestep_spacing": "leading"}
    assert UniPCMultistepScheduler.from_config(config).timestep_spacing == "leading"
    config["_use_default_values"] = ["timestep_spacing"]
    other = UniPCMultistepScheduler.from_config(config, solver_order=3)
    assert (other.timestep_spacing, other.beta_end, other.solver_order) == ("linspace", 0.03, 3)
    again = DPMSolverMultistepScheduler.from_config(other)
    assert (again.beta_end, again.solver_order) == (0.03, 3)


def test_a_list_of_generators_draws_one_sample_each() -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 4, 5)
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    both = scheduler.step(x, scheduler.timesteps[0], x, generators)
    for i, seed in enumerate((5, 6)):
        scheduler.set_begin_index(0)
        generator = torch.Generator().manual_seed(seed)
        one = scheduler.step(x[i : i + 1], scheduler.timesteps[0], x[i : i + 1], generator)
        assert torch.equal(both[i : i + 1], one)

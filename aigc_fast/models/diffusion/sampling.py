"""Sampling from a diffusion model, step by step."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from aigc_fast import schedulers
from aigc_fast._graphs import Replay, check_graph
from aigc_fast.schedulers import Scheduler
from aigc_fast.schedulers.noise import Generator, draw_noise


def sample(
    model: nn.Module,
    scheduler: Scheduler,
    shape: Sequence[int],
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    num_steps: int = 30,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    seed: int | Sequence[int] = 0,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """New samples, `shape`, with the dtype and on the device of the model.

    shape:   (batch, ...), what the model takes.
    labels:  (batch,) classes; the other arguments of guidance are those of `sample_images`.
    seed:    of the noise, drawn on the CPU and so the same on every device. Of a sequence each seed
             is that of one sample, which then does not depend on what else is in the batch.
    on_step: called after each step with its number from 1, the sample, and the x0 it leads to: for
             a progress bar, or to keep intermediate images. The tensors stay as they are.

    Where the same is done again and again on a GPU, `Sampler` can replay it as one CUDA graph.

    Raises ValueError for a number of labels or seeds that is not the batch, or what `sample_images`
    raises.
    """
    _check_scheduler(scheduler)
    noise, random = _begin(model, shape, labels, seed)
    result = noise
    stages = sample_images(
        model, noise, scheduler, labels=labels, null_label=null_label, num_steps=num_steps,
        guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, generator=random,
    )  # fmt: skip
    for number, (result, x0) in enumerate(stages, start=1):
        if on_step is not None:
            on_step(number, result, x0)
    return result


def _begin(
    model: nn.Module, shape: Sequence[int], labels: Tensor | None, seed: int | Sequence[int]
) -> tuple[Tensor, list[torch.Generator]]:
    """The noise to start from, and what draws the noise on the way."""
    for name, given in (("labels", labels), ("seed", None if isinstance(seed, int) else seed)):
        if given is not None and len(given) != shape[0]:
            raise ValueError(f"{name} must be {shape[0]}, one for each sample, got {len(given)}")
    seeds = [seed] if isinstance(seed, int) else seed
    random = [torch.Generator().manual_seed(s) for s in seeds]
    return draw_noise(next(model.parameters()).new_empty(tuple(shape)), random), random


class Sampler:
    """`sample` for many calls with the same options. With `cuda_graph` all steps of a call,
    guidance included, are one CUDA graph, and nothing in it waits for the device.

    >>> sampler = Sampler(model, DPMSolverMultistepScheduler(), num_steps=20, cuda_graph=True)
    >>> images = [sampler((16, 3, 32, 32), seed=seed) for seed in range(100)]

    The samples are those of `sample`; the noise of stochastic solvers, too, is drawn on the CPU
    before the steps. For each shape the first call runs the steps one by one and the second one
    records them (with a stochastic solver one call later); until then samples take as long as with
    `sample`. The graph of a shape keeps its memory, so use few shapes. Between calls nothing of
    the model may change but the values of its parameters, and its `forward` must not wait for the
    device.

    That the loop can be recorded is tested on the CPU, by replaying the operators that it calls;
    the recording itself has not run on a GPU yet.

    scheduler:  a copy is taken.
    null_label, num_steps, guidance_scale, guidance_rescale: as for `sample`.
    cuda_graph: whether to record; False only calls the same steps.

    Raises ValueError for cuda_graph on a CPU; RuntimeError from the second call on where the model
    or the solver cannot be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Scheduler,
        *,
        null_label: int | None = None,
        num_steps: int = 30,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        cuda_graph: bool = False,
    ) -> None:
        _check_scheduler(scheduler)
        self._model, self._scheduler = model, copy.deepcopy(scheduler)
        self._guidance = null_label, guidance_scale, guidance_rescale
        device = next(model.parameters()).device
        self._scheduler.set_timesteps(num_steps, device)
        self._run: Callable[..., tuple[Tensor, ...]] = self._steps
        check_graph(cuda_graph, device)
        if cuda_graph:
            self._run = Replay(self._steps, device)
        self._random: Generator = None
        self._draws: dict[tuple[int, ...], list[tuple[Tensor, torch.dtype | None]]] = {}

    def __call__(
        self, shape: Sequence[int], *, labels: Tensor | None = None, seed: int | Sequence[int] = 0
    ) -> Tensor:
        """New samples; arguments and errors as of `sample`."""
        _check_guidance(self._guidance[1], self._guidance[0], labels)
        noise, self._random = _begin(self._model, shape, labels, seed)
        draws = self._draws.get(tuple(shape), [])
        drawn = [draw_noise(like, self._random, dtype) for like, dtype in draws]
        return self._run(noise, labels, *drawn)[0]

    def _steps(self, noise: Tensor, labels: Tensor | None, *drawn: Tensor) -> tuple[Tensor]:
        """All steps, with the noise they ask for; where none is given they draw it themselves, and
        what they draw is remembered."""
        waiting, draws = iter(drawn), []

        def draw(like: Tensor, dtype: torch.dtype | None) -> Tensor:
            # Of one element, but with the shape.
            draws.append((like.new_empty(()).expand(like.shape), dtype))
            return next(waiting) if drawn else draw_noise(like, self._random, dtype)

        stages = _steps_from(self._model, noise, self._scheduler, labels, *self._guidance, draw)
        *_, (result, _) = stages
        self._draws[tuple(noise.shape)] = draws
        return (result,)


def sample_images(
    model: nn.Module,
    noise: Tensor,
    scheduler: Scheduler,
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    num_steps: int = 30,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    generator: Generator = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (sample, x0) after every step: where the sample stands, and where it seems to go.

    model:     model(sample, timesteps, labels) predicts what scheduler.prediction_type says.
    noise:     standard normal, the start.
    null_label: the class that stands for "any". Where guidance_scale is not 1, the model is asked
        for it too, and the prediction is the label's, guidance_scale times as far from it.
    guidance_rescale: see ops.scheduler_step.
    generator: of the noise of stochastic solvers, or one for each sample.

    Raises ValueError for a guidance_scale without null_label and labels; TypeError for a scheduler
    that is not of aigc_fast.schedulers (diffusers', for instance), or a model whose result is no
    tensor.
    """
    _check_scheduler(scheduler)
    _check_guidance(guidance_scale, null_label, labels)
    scheduler.set_timesteps(num_steps, noise.device)
    return _steps_from(
        model, noise, scheduler, labels, null_label, guidance_scale, guidance_rescale, generator
    )


def _check_scheduler(scheduler: object) -> None:
    if not isinstance(scheduler, Scheduler):
        name = type(scheduler).__name__
        message = f"scheduler must be one of aigc_fast.schedulers, got {name}"
        if hasattr(schedulers, name):
            message += (
                f" of {type(scheduler).__module__}; it becomes one by "
                f"aigc_fast.schedulers.{name}.from_config(scheduler.config)"
            )
        raise TypeError(message)


def _check_guidance(scale: float, null_label: int | None, labels: Tensor | None) -> None:
    if scale != 1 and (null_label is None or labels is None):
        raise ValueError(f"guidance_scale {scale} needs labels and null_label")


def _steps_from(
    model: nn.Module,
    noise: Tensor,
    scheduler: Scheduler,
    labels: Tensor | None,
    null_label: int | None,
    guidance_scale: float,
    guidance_rescale: float,
    generator: Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`sample_images` on a schedule that is laid out."""
    guided = guidance_scale != 1
    if guided and labels is not None and null_label is not None:
        labels = torch.cat([labels, torch.full_like(labels, null_label)])
    scheduler.set_begin_index()
    sample, copies = noise * scheduler.init_noise_sigma, 1 + guided
    for timestep in scheduler.timestep_values:
        with torch.no_grad():  # no longer than the step: it must not outlive a yield
            model_input = torch.cat([scheduler.scale_model_input(sample, timestep)] * copies)
            steps = torch.full((len(model_input),), timestep, device=noise.device)
            predicted = model(model_input, steps, labels)
            if not isinstance(predicted, Tensor):
                raise TypeError(
                    f"model must return a tensor, got {type(predicted).__name__}: of diffusers' "
                    "models, aigc_fast.models.diffusion.UNet and DiT take the weights"
                )
            output, *uncond = predicted.chunk(copies)
            sample, x0 = scheduler.step(
                output,
                timestep,
                sample,
                generator,
                uncond_output=uncond[0] if uncond else None,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale if guided else 0.0,
                return_x0=True,
            )
        yield sample, x0

"""The fused step, add_noise, scale_noise and get_velocity in diffusers' own scheduler classes.

    from aigc_fast.integrations import diffusers
    diffusers.install()

Class identity, signatures, outputs and the state that diffusers keeps (step_index, model_outputs,
ets, ...) stay as they are, and so does a pipeline. A call that the fused step does not serve (a
sample of another dtype than the model's output, a timestep outside the schedule, ...) runs the
stock method, with its own errors.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aigc_fast import schedulers
from aigc_fast.integrations.diffusers_exact import exact_step
from aigc_fast.integrations.diffusers_noise import NOISE
from aigc_fast.schedulers.flow_match import growing_step, renoise_step
from aigc_fast.schedulers.pndm import pndm_step
from aigc_fast.schedulers.scheduler import shift_in
from aigc_fast.schedulers.tables import Tables

#: class -> {attribute: the stock method}, while installed
_stock: dict[type, dict[str, Any]] = {}
#: which contract it was that `install` was last asked for
_exact = False


class Fused(NamedTuple):
    """How a class of diffusers runs a step of ours."""

    output_class: str | None = None  # by default that of the scheduler's module, SchedulerOutput
    by_timestep: bool = False  # a step is found by its timestep, not by step_index
    float_timesteps: bool = False  # an integer timestep is an error
    warns: bool = False  # of a loop without scale_model_input
    upcasts: bool = False  # x0 is returned in float32
    noise_levels: str | None = None  # of add_noise and scale_noise


_EULER = Fused(float_timesteps=True, warns=True, upcasts=True, noise_levels="sigma")
FUSED = {
    "DDPMScheduler": Fused(by_timestep=True, noise_levels="training"),
    "DDIMScheduler": Fused(by_timestep=True, noise_levels="training"),
    "DDIMInverseScheduler": Fused("DDIMSchedulerOutput", by_timestep=True),
    "PNDMScheduler": Fused(by_timestep=True, noise_levels="training"),
    "LCMScheduler": Fused(noise_levels="training"),
    "TCDScheduler": Fused(noise_levels="training"),
    "CMStochasticIterativeScheduler": Fused(float_timesteps=True, warns=True, noise_levels="sigma"),
    "EulerDiscreteScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": _EULER,
    "EDMEulerScheduler": _EULER,
    "HeunDiscreteScheduler": Fused(noise_levels="sigma"),
    "KDPM2DiscreteScheduler": Fused(noise_levels="sigma"),
    "KDPM2AncestralDiscreteScheduler": Fused(noise_levels="sigma"),
    "LMSDiscreteScheduler": Fused(warns=True, noise_levels="sigma"),
    "IPNDMScheduler": Fused(),
    "DPMSolverMultistepScheduler": Fused(noise_levels="lambda"),
    "DPMSolverSinglestepScheduler": Fused(noise_levels="lambda"),
    "EDMDPMSolverMultistepScheduler": Fused(noise_levels="sigma"),
    "DEISMultistepScheduler": Fused(noise_levels="lambda"),
    "UniPCMultistepScheduler": Fused(noise_levels="lambda"),
    "SASolverScheduler": Fused(noise_levels="training"),
    "FlowMatchEulerDiscreteScheduler": Fused(float_timesteps=True, noise_levels="flow"),
    "FlowMatchHeunDiscreteScheduler": Fused(float_timesteps=True),
    "FlowMatchLCMScheduler": Fused(float_timesteps=True, noise_levels="flow"),
}


def install(*, exact: bool = False) -> list[str]:
    """Puts the fused methods into diffusers' classes; returns their names. Once is enough.

    exact: False: the fast contract. A step is one pass that computes in fp32 inside and rounds
           once: closer to float64 than diffusers is, and other bits.
           True: the exact contract. A step has the bits of diffusers, rounded after each of its
           operators, and the strides. The first time a scheduler comes to a step the stock method
           runs and is watched, which takes three to nine times as long as it does alone; each
           further time, also by another scheduler with the same configuration and schedule, its
           operators run in one pass (`ops.pointwise_program`). What is no row of elementwise
           operators stays stock: dynamic thresholding, UniPC of order 3 (matrix products), learned
           variances, the Runge-Kutta steps of PNDM (which add to a tensor in place), flow matching
           of float64 samples (which it rounds to float32); so do samples on a GPU or with
           gradients, lists of generators, torch.compile, and add_noise, scale_noise and
           get_velocity.

    The other contract than that of the last call replaces it.
    """
    import diffusers

    global _exact
    if exact is not _exact:
        uninstall()
        _exact = exact
    for name, how in FUSED.items():
        cls = getattr(diffusers, name, None)
        # A class whose requirements are missing (LMS without scipy) has nothing to replace.
        if cls is None or cls in _stock or "step" not in vars(cls):
            continue
        if exact:
            methods = {"step": exact_step(vars(cls)["step"], how.warns)}
        else:
            methods = _fused(cls, name, how)
        _stock[cls] = {method: vars(cls)[method] for method in methods}
        for method, function in methods.items():
            setattr(cls, method, function)
    return [cls.__name__ for cls in _stock]


def _fused(cls: type, name: str, how: Fused) -> dict[str, Callable]:
    methods = {"step": _step(cls, getattr(schedulers, name), how)}
    if how.noise_levels is not None:
        for method, make in NOISE.items():
            if method in vars(cls):
                methods[method] = make(vars(cls)[method], how.noise_levels)
    return methods


def uninstall() -> None:
    """Gives diffusers' classes their own methods back."""
    for cls, methods in _stock.items():
        for method, function in methods.items():
            setattr(cls, method, function)
    _stock.clear()


# ---- step ---------------------------------------------------------------------------------------


def _step(cls: type, ours: type, how: Fused) -> Callable:
    stock = vars(cls)["step"]
    advance = ours.advance  # type: ignore[attr-defined]
    if advance is growing_step:  # what enlarges its samples runs the stock method
        advance = renoise_step
    names = list(inspect.signature(stock).parameters)[4:]
    accepted = set(inspect.signature(advance).parameters)
    module: Any = inspect.getmodule(cls)
    output_class = getattr(module, how.output_class or f"{cls.__name__}Output", None)
    output_class = output_class or module.SchedulerOutput
    second = ours.second_output  # type: ignore[attr-defined]
    wants_x0 = second is not None
    by_timestep, float_timesteps, warns, upcasts = how[1:5]
    find = _pndm_index if advance is pndm_step else _index_of_timestep if by_timestep else _index
    refuses = _REFUSES.get(cls.__name__)
    before = _BEFORE.get(cls.__name__)

    @functools.wraps(stock)
    def step(
        self: Any,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        generator: Any = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        if args:
            options.update(zip(names, args, strict=False))
            generator = options.pop("generator", generator)
            return_dict = options.pop("return_dict", return_dict)
        index = None
        if (
            isinstance(sample, Tensor)
            and isinstance(model_output, Tensor)
            and model_output.dtype is sample.dtype
            and (model_output.shape == sample.shape or _has_variance(self, model_output, sample))
            and model_output.get_device() == sample.get_device()
            and (not warns or self.is_scale_input_called)
            and (not float_timesteps or _is_float(timestep))
            and (refuses is None or not refuses(self, sample, options))
        ):
            index = find(self, timestep)
        if index is None:
            if "generator" in names:
                options["generator"] = generator
            return stock(self, model_output, timestep, sample, return_dict=return_dict, **options)
        if options:
            options = {k: v for k, v in options.items() if k in accepted}
        if before is not None:
            before(self, model_output, timestep, options)
        prev, x0 = advance(
            self, index, sample, model_output, generator, wants_x0, _NO_GUIDANCE, **options
        )
        if not by_timestep:
            self._step_index = index + 1
        if not wants_x0:
            return output_class(prev_sample=prev) if return_dict else (prev,)
        if upcasts and x0.dtype is not torch.float32:
            x0 = x0.to(torch.float32)
        if not return_dict:
            return prev, x0
        return output_class(**{"prev_sample": prev, second: x0})

    return step


_NO_GUIDANCE: dict[str, Any] = {}


def _has_variance(self: Any, output: Tensor, sample: Tensor) -> bool:
    """Of a model that predicts a variance too, by twice the channels."""
    return (
        output.dim() == sample.dim() > 1
        and output.shape[0] == sample.shape[0]
        and output.shape[1] == 2 * sample.shape[1]
        and output.shape[2:] == sample.shape[2:]
        and getattr(self.config, "variance_type", None) in ("learned", "learned_range")
        and (sample.shape[1] == 3 or "DDPM" in type(self).__name__)
    )


def _is_float(timestep: Any) -> bool:
    if type(timestep) is Tensor:
        return timestep.is_floating_point()
    return not isinstance(timestep, int)


def _index(self: Any, timestep: Any) -> int | None:
    if self.num_inference_steps is None:
        return None
    index = self._step_index
    if index is None:
        self._init_step_index(timestep)
        index = self._step_index
    return index


def _index_of_timestep(self: Any, timestep: Any) -> int | None:
    if self.timesteps is None:
        return None
    return Tables.of(self).index(timestep)


def _pndm_index(self: Any, timestep: Any) -> int | None:
    """The timesteps of Runge-Kutta stages stand there twice: the counter tells them apart."""
    index = _index_of_timestep(self, timestep)
    if index is None or index == self.counter:
        return index
    values = Tables.of(self).values()
    if self.counter < len(values) and values[index] == values[self.counter]:
        return self.counter
    runge_kutta = self.counter < len(self.prk_timesteps) and not self.config.skip_prk_steps
    return None if runge_kutta else index


# ---- what a class has of its own ----------------------------------------------------------------


def _ddim_refuses(self: Any, sample: Tensor, options: dict) -> bool:
    if self.num_inference_steps is None:
        return True
    noise = options.get("variance_noise")
    options.setdefault("eta", 0.0)
    return noise is not None and (noise.dtype != sample.dtype or noise.shape != sample.shape)


def _pndm_refuses(self: Any, sample: Tensor, options: dict) -> bool:
    if self.num_inference_steps is None:
        return True
    runge_kutta = not self.config.skip_prk_steps
    return runge_kutta and self.counter >= len(self.prk_timesteps) and len(self.ets) < 3


#: class -> refuses(self, sample, options): calls that look as if they fit, and do not
_REFUSES: dict[str, Callable[[Any, Tensor, dict], bool]] = {
    "DDPMScheduler": lambda self, sample, _: (
        self.variance_type in ("learned", "learned_range") and sample.dim() < 2
    ),
    "DDIMScheduler": _ddim_refuses,
    "DDIMInverseScheduler": lambda self, *_: self.num_inference_steps is None,
    "PNDMScheduler": _pndm_refuses,
    "LMSDiscreteScheduler": lambda self, _, options: not 1 <= options.get("order", 4) <= 4,
    "EDMEulerScheduler": lambda self, _, options: options.get("pred_original_sample") is not None,
    "EDMDPMSolverMultistepScheduler": lambda self, *_: (
        self.config.solver_order == 3 and self.config.algorithm_type == "sde-dpmsolver++"
    ),
    "FlowMatchEulerDiscreteScheduler": lambda self, _, options: (
        options.get("per_token_timesteps") is not None
    ),
    "FlowMatchLCMScheduler": lambda self, *_: bool(self._scale_factors and self._upscale_mode),
    "UniPCMultistepScheduler": lambda self, *_: self.solver_p is not None,
}


def _keep_timestep(self: Any, output: Tensor, timestep: Any, options: dict) -> None:
    shift_in(self.timestep_list, timestep)


def _keep_size(self: Any, output: Tensor, timestep: Any, options: dict) -> None:
    if self._init_size is None:
        self._init_size = output.size()[2:]


_BEFORE: dict[str, Callable[[Any, Tensor, Any, dict], None]] = {
    "UniPCMultistepScheduler": _keep_timestep,
    "SASolverScheduler": _keep_timestep,
    "FlowMatchLCMScheduler": _keep_size,
}

"""The schedulers that sample on the command line, by their names."""

import re
from dataclasses import fields
from typing import Any

from aigc_fast import schedulers
from aigc_fast.schedulers import Scheduler
from aigc_fast.training.denoising import PREDICTIONS, SCHEDULES

#: Parts of class names, as the field spells them.
_SPELLINGS = {"DPMSolverMultistep": "Dpmpp_2m", "UniPC": "Unipc", "FlowMatch": "Flow"}


def _name(cls: type) -> str:
    """EulerAncestralDiscreteScheduler is euler_ancestral."""
    name = cls.__name__
    for part, spelling in _SPELLINGS.items():
        name = name.replace(part, spelling)
    name = re.sub("(Multistep|Discrete)?Scheduler$", "", name)
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


_CLASSES: dict[str, Any] = {
    _name(cls): cls
    for cls in map(vars(schedulers).get, schedulers.__all__)
    if isinstance(cls, type) and issubclass(cls, Scheduler) and cls is not Scheduler
}
# From an image to its noise.
del _CLASSES["ddim_inverse"]
#: They end flow matching at the level of noise before the last, and leave that in the picture, as
#: diffusers' do.
_UNFINISHED = {("flow_prediction", "deis"), ("flow_prediction", "sa_solver")}


def names_for(prediction: str) -> list[str]:
    """The schedulers that sample from a model of such a prediction, with betas of its noise
    schedule or the levels of flow matching."""
    kind = PREDICTIONS[prediction]
    return [
        name
        for name, cls in _CLASSES.items()
        if (kind in getattr(cls, "predictions", ()) and (kind, name) not in _UNFINISHED)
        or (prediction == "flow" and name.startswith("flow_"))
    ]


def make_scheduler(name: str, prediction: str, schedule: str) -> Scheduler:
    """The solver `name` for a model of such a prediction; ValueError where there is none."""
    fitting = names_for(prediction)
    if name not in fitting:
        raise ValueError(
            f"scheduler must be one of {', '.join(fitting)} for {prediction} prediction, "
            f"got {name!r}"
        )
    cls = _CLASSES[name]
    options: dict[str, Any] = {"prediction_type": PREDICTIONS[prediction]}
    if prediction == "flow":
        options["use_flow_sigmas"] = True
    else:
        options |= {
            "beta_schedule": SCHEDULES[schedule],
            # PNDM extrapolates epsilon: from where nothing is left of the signal, into noise.
            "timestep_spacing": "leading"
            if (name, prediction) == ("pndm", "epsilon")
            else "trailing",
            # DDIM would clip x0 and not the noise that belongs to it. Guidance reaches beyond the
            # range of pixels: in fifty steps at 2, it spoils two digits of three.
            "clip_sample": False,
            # Runge-Kutta steps from where nothing is left of the signal do not end.
            "skip_prk_steps": True,
            # Nor does a step of two stages that falls from sigma 20,000 of the cosine schedule to
            # 13: in twenty of them Heun made noise.
            "use_exponential_sigmas": getattr(cls, "order", 1) == 2,
        }
    own = {field.name for field in fields(cls)}
    return cls(**{key: value for key, value in options.items() if key in own})

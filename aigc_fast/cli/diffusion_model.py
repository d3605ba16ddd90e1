"""The diffusion models of the command line, as files, and the schedulers that sample from them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aigc_fast.models.diffusion import DiT, SmallUNet
from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Scheduler,
    UniPCMultistepScheduler,
)
from aigc_fast.training.denoising import PREDICTIONS, SCHEDULES

from .weights import load_weights, save_weights

#: What a model is made of and what it predicts: image_channels, size, channels (of the levels),
#: num_classes (0 for no labels), prediction and schedule; and of a model of video, frames and
#: patch, the [frames, rows, columns] of a token.
Config = dict[str, Any]

_HEAD_DIM = 32

_SOLVERS: dict[str, type] = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
}
SCHEDULERS = tuple(_SOLVERS)


def make_model(config: Config) -> nn.Module:
    """A U-Net for images, a transformer for video."""
    channels, classes = config["channels"], config["num_classes"]
    sample_shape(config)  # what the file lacks shows here, not later
    check_choice("prediction", config["prediction"], PREDICTIONS)
    check_choice("schedule", config["schedule"], SCHEDULES)
    if "frames" not in config:
        model = SmallUNet(config["image_channels"], channels, num_classes=classes)
        # Convolutions are a tenth faster in this layout.
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DiT(
        dict(
            in_channels=config["image_channels"],
            sample_size=config["size"],
            patch_size=config["patch"],
            num_layers=len(channels),
            num_attention_heads=channels[0] // _HEAD_DIM,
            attention_head_dim=_HEAD_DIM,
            num_embeds_ada_norm=classes,
        )
    )


def sample_shape(config: Config) -> tuple[int, ...]:
    """(channels, [frames,] height, width)"""
    frames = [config["frames"]] if "frames" in config else []
    return (config["image_channels"], *frames, config["size"], config["size"])


def save_model(path: Path, model: nn.Module, config: Config) -> None:
    save_weights(path, model, "diffusion", config)


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, Config]:
    """What `save_model` wrote; ValueError for another file."""
    return load_weights(path, "diffusion", make_model, device)


def make_scheduler(name: str, prediction: str, schedule: str) -> Scheduler:
    """The solver `name` for a model of such a prediction; ValueError where there is none."""
    check_choice("scheduler", name, _SOLVERS)
    flow = prediction == "flow"
    if flow != (name == "flow_euler") and not (flow and name in ("dpmpp_2m", "unipc")):
        fitting = ("flow_euler", "dpmpp_2m", "unipc") if flow else SCHEDULERS[:-1]
        raise ValueError(
            f"scheduler must be one of {', '.join(fitting)} for {prediction} prediction, "
            f"got {name!r}"
        )
    if name == "flow_euler":
        return FlowMatchEulerDiscreteScheduler()
    kind = PREDICTIONS[prediction]
    if flow:
        return _SOLVERS[name](prediction_type=kind, use_flow_sigmas=True)
    options: dict[str, Any] = {
        "beta_schedule": SCHEDULES[schedule],
        "prediction_type": kind,
        "timestep_spacing": "trailing",
    }
    if name == "ddim":
        # It would clip x0 and not the noise that belongs to it. Guidance reaches beyond the range
        # of pixels: in fifty steps at 2, it spoils two digits of three.
        options["clip_sample"] = False
    return _SOLVERS[name](**options)

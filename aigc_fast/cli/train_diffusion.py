"""Training a diffusion model: what to predict by name, checkpoints, a log, pictures."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast.models.diffusion import sample
from aigc_fast.training import DiffusionRecipe, DiffusionStep, DiffusionTrainer

from .diffusion_model import make_model, make_scheduler, save_model
from .pictures import save_grid
from .training_session import RunOptions, TrainingSession, load_data

_GRID = 40  # samples of a picture, in rows of ten


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Those of the command, which explains them."""

    steps: int = 5000
    batch: int = 32
    prediction: str = "v"
    schedule: str = "cosine"
    weighting: str | None = None
    class_conditional: bool = False
    size: int = 28
    channels: int = 32
    lr: float = 2e-3
    bf16: bool = False
    gradient_checkpointing: bool = False


def run(console: Console, options: Options) -> int:
    """Exit code: 0, or 2 for options, data or a checkpoint that will not do."""
    try:
        session = Session(options)
    except (ValueError, OSError, ImportError) as error:
        console.print(f"[bold red]{error}[/]", soft_wrap=True)
        return 2
    session.train(console)
    return 0


class Session(TrainingSession):
    """`model.safetensors` of the averaged weights is what `aigc-fast sample diffusion` reads."""

    losses = ("loss",)

    def __init__(self, options: Options) -> None:
        self.options = options
        recipe = DiffusionRecipe(
            options.prediction, options.schedule, options.weighting, lr=options.lr,
            bf16=options.bf16, gradient_checkpointing=options.gradient_checkpointing,
        )  # fmt: skip
        if options.channels < 8 or options.channels % 8:
            raise ValueError(f"channels must be a multiple of 8, got {options.channels}")
        if options.size < 2 or options.size % 2:
            raise ValueError(f"size must be even, got {options.size}")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        samples, labels = load_data(options.data, options.size)
        classes = int(labels.max()) + 1 if options.class_conditional else 0
        self.samples = samples.to(device)
        self.labels = labels.to(device) if options.class_conditional else None
        self.networks = {
            "image_channels": samples.shape[1],
            "size": samples.shape[-1],
            "channels": [options.channels * i for i in (1, 2, 3)],
            "num_classes": classes,
            "prediction": options.prediction,
            "schedule": options.schedule,
        }
        torch.manual_seed(options.seed)
        # Convolutions are a tenth faster in this layout.
        layout: Any = {"device": device, "memory_format": torch.channels_last}
        model = make_model(self.networks).to(**layout)
        self.trainer = DiffusionTrainer(
            model, recipe, done=self.share_done, null_label=classes if classes else None,
            seed=options.seed,
        )  # fmt: skip
        self.open()

    def losses_of(self, state: DiffusionStep) -> tuple[Tensor, ...]:
        return (state.loss,)

    def keep_samples(self) -> None:
        networks, output, model = self.networks, self.options.output, self.trainer.average
        save_model(output / "model.safetensors", model, networks)
        classes = networks["num_classes"]
        images = sample(
            model,
            make_scheduler("dpmpp_2m", networks["prediction"], networks["schedule"]),
            (_GRID, *self.samples.shape[1:]),
            labels=torch.arange(_GRID, device=self.samples.device) % classes if classes else None,
            null_label=classes if classes else None,
            num_steps=12,
            guidance_scale=2.0 if classes else 1.0,
        )
        save_grid(output / "samples.png", images.cpu(), columns=10)

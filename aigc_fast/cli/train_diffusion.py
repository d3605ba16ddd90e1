"""Training a diffusion model: what to predict by name, checkpoints, a log, pictures."""

import torch
from torch import Tensor

from aigc_fast._devices import default_device
from aigc_fast.models.diffusion import sample
from aigc_fast.training import DiffusionRecipe, DiffusionStep, DiffusionTrainer

from .diffusion_model import make_model, sample_shape, save_model, to_sample_from
from .labels import labels_of
from .pictures import save_grid, save_videos
from .schedulers import make_scheduler
from .train import DiffusionOptions
from .training_session import TrainingSession, load_data

_GRID = 40  # samples of a picture, in rows of ten
_VIDEOS = 10  # of a picture, a row each
_LAYERS = 6  # of a transformer


class Session(TrainingSession):
    """`model.safetensors` of the averaged weights is what `aigc-fast sample diffusion` reads."""

    losses = ("loss",)

    def __init__(self, options: DiffusionOptions) -> None:
        self.options = options
        recipe = DiffusionRecipe(
            options.prediction, options.schedule, options.weighting, lr=options.lr,
            bf16=options.bf16, gradient_checkpointing=options.gradient_checkpointing,
        )  # fmt: skip
        if options.channels < 8 or options.channels % 8:
            raise ValueError(f"channels must be a multiple of 8, got {options.channels}")
        device = default_device()
        samples, labels = load_data(options.data, options.size)
        videos = samples.dim() == 5
        if videos:
            _check_patch(options.patch, samples.shape[2:])
        elif options.size < 2 or options.size % 2:
            raise ValueError(f"size must be a positive multiple of 2, got {options.size}")
        classes = int(labels.max()) + 1 if options.class_conditional else 0
        self.samples = samples.to(device)
        self.labels = labels.to(device) if options.class_conditional else None
        width = options.channels
        self.networks = {
            "image_channels": samples.shape[1],
            "size": samples.shape[-1],
            "channels": [4 * width] * _LAYERS if videos else [width * i for i in (1, 2, 3)],
            "num_classes": classes,
            "prediction": options.prediction,
            "schedule": options.schedule,
        }
        if videos:
            self.networks |= {"frames": samples.shape[2], "patch": list(options.patch)}
        torch.manual_seed(options.seed)
        model = make_model(self.networks).to(device)
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
        classes, videos = networks["num_classes"], "frames" in networks
        count = _VIDEOS if videos else _GRID
        samples = sample(
            to_sample_from(model, networks),
            make_scheduler("dpmpp_2m", networks["prediction"], networks["schedule"]),
            (count, *sample_shape(networks)),
            labels=labels_of(count, None, classes, self.samples.device),
            null_label=classes if classes else None,
            num_steps=12,
            guidance_scale=2.0 if classes else 1.0,
        ).cpu()
        if videos:
            save_videos(output / "samples.png", samples)
            save_videos(output / "samples.gif", samples)
        else:
            save_grid(output / "samples.png", samples, columns=10)


def _check_patch(patch: tuple[int, int, int], video: torch.Size) -> None:
    if any(p < 1 or n % p for p, n in zip(patch, video, strict=True)):
        raise ValueError(
            f"patch must divide the videos, {tuple(video)} frames, rows and columns, got {patch}"
        )

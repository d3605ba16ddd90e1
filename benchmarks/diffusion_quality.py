"""How often the digits of a diffusion model are those it was asked for, by sampler.

    python -m benchmarks.diffusion_quality [--guidance 2] [MODEL ...]

Each model is a model.safetensors of `aigc-fast train diffusion --class-conditional`; by default
those in docs/diffusion. The judge is a small classifier that has seen 4,500 real digits and nothing
else; the 500 it has not seen stand in the table for comparison. Of a model of moving digits it is
shown all frames of 100 videos, each with its digit in the middle and as large as those it knows.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.cli.diffusion_model import load_model, sample_shape
from aigc_fast.cli.schedulers import make_scheduler
from aigc_fast.models.diffusion import sample
from aigc_fast.training.quality import CONFIDENT, Quality, assess, train_classifier
from benchmarks.gan_quality import SAMPLES, digits

MODELS = Path(__file__).parent.parent / "docs" / "diffusion"
#: (scheduler, steps) of models that predict v or epsilon, and of those that predict the flow
SAMPLERS = [("ddim", 50), ("dpmpp_2m", 20), ("unipc", 10)]
FLOW_SAMPLERS = [("flow_euler", 20)]
_BATCH = 250
_VIDEOS = 100
#: pixels of a moving digit's image, as a share of its frame
_SHARE = 0.8


def row(name: str, quality: Quality, seconds: float | None = None) -> str:
    return (
        f"| {name} | {quality.as_asked:.1%} | {quality.confident:.1%} | {quality.frechet:.1f} | "
        f"{'' if seconds is None else f'{seconds:.0f}'} |"
    )


def centred(frames: Tensor) -> Tensor:
    """Square frames (count, 1, size, size) as images (count, 1, 28, 28): enlarged until the image
    of the digit has 28 pixels, and cut out around its centre of mass, as the real ones are."""
    size = round(28 / _SHARE)
    frames = F.interpolate(frames, (size, size), mode="bilinear").clamp(-1, 1)
    ink = (frames + 1).square()  # faint noise counts for little
    place = torch.arange(size) + 0.5
    total = ink.sum((1, 2, 3)).clamp(min=1e-6)
    y, x = ((ink.sum(axis) * place).sum(-1)[:, 0] / total for axis in (3, 2))
    padded = F.pad(frames, (14, 14, 14, 14), value=-1.0)
    corners = torch.stack([y, x], 1).round().int().clamp(0, size).tolist()
    cut = [image[:, i : i + 28, j : j + 28] for image, (i, j) in zip(padded, corners, strict=True)]
    return torch.stack(cut)


def small(images: Tensor, size: int) -> Tensor:
    """Real digits at the resolution that they have in a video of `size` pixels."""
    side = round(_SHARE * size)
    low = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return centred(F.pad(low, (0, size - side) * 2, value=-1.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", type=Path, default=sorted(MODELS.glob("*.safetensors"))
    )
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    train_images, train_labels, images, labels = digits()
    classifier = train_classifier(train_images, train_labels)
    print(f"{SAMPLES} samples, {SAMPLES // 10} of each class, guidance {options.guidance:g}.\n")
    print(f"| model, sampler, steps | as asked | confident (> {CONFIDENT}) | Fréchet | seconds |")
    print("|---|---|---|---|---|")
    print(row("real, held out", assess(classifier, images, train_images, labels)))
    for path in options.models:
        model, config = load_model(path, torch.device("cpu"))
        shape, videos = sample_shape(config), "frames" in config
        asked = torch.arange(_VIDEOS if videos else SAMPLES) % 10
        if videos:
            quality = assess(classifier, small(images, config["size"]), train_images, labels)
            print(row(f"real, held out, in frames of {config['size']} pixels", quality))
        for name, steps in FLOW_SAMPLERS if config["prediction"] == "flow" else SAMPLERS:
            start = time.perf_counter()
            pieces = [
                sample(
                    model,
                    make_scheduler(name, config["prediction"], config["schedule"]),
                    (len(part), *shape),
                    labels=part,
                    null_label=config["num_classes"],
                    num_steps=steps,
                    guidance_scale=options.guidance,
                    seed=seed,
                )
                for seed, part in enumerate(asked.split(_BATCH))
            ]
            samples, classes = torch.cat(pieces), asked
            if videos:
                samples = centred(samples.transpose(1, 2).flatten(0, 1))
                classes = asked.repeat_interleave(config["frames"])
            quality = assess(classifier, samples, train_images, classes)
            label = f"{path.stem}, {name}, {steps}"
            print(row(label, quality, time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()

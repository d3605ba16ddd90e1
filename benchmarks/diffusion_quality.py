"""How often the digits of a diffusion model are those it was asked for, by sampler.

    python -m benchmarks.diffusion_quality [--guidance 2] [MODEL ...]

Each model is a model.safetensors of `aigc-fast train diffusion --class-conditional`; by default
those in docs/diffusion. The judge is a small classifier that has seen 4,500 real digits and nothing
else; the 500 it has not seen stand in the table for comparison.
"""

import argparse
import time
from pathlib import Path

import torch

from aigc_fast.cli.diffusion_model import load_model, make_scheduler
from aigc_fast.models.diffusion import sample
from aigc_fast.training.quality import CONFIDENT, Quality, assess, train_classifier
from benchmarks.gan_quality import SAMPLES, digits

MODELS = Path(__file__).parent.parent / "docs" / "diffusion"
#: (scheduler, steps) of models that predict v or epsilon, and of those that predict the flow
SAMPLERS = [("ddim", 50), ("dpmpp_2m", 20), ("unipc", 10)]
FLOW_SAMPLERS = [("flow_euler", 20)]
_BATCH = 250


def row(name: str, quality: Quality, seconds: float | None = None) -> str:
    return (
        f"| {name} | {quality.as_asked:.1%} | {quality.confident:.1%} | {quality.frechet:.1f} | "
        f"{'' if seconds is None else f'{seconds:.0f}'} |"
    )


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
    asked = torch.arange(SAMPLES) % 10
    for path in options.models:
        model, config = load_model(path, torch.device("cpu"))
        for name, steps in FLOW_SAMPLERS if config["prediction"] == "flow" else SAMPLERS:
            start = time.perf_counter()
            pieces = [
                sample(
                    model,
                    make_scheduler(name, config["prediction"], config["schedule"]),
                    (len(part), 1, 28, 28),
                    labels=part,
                    null_label=config["num_classes"],
                    num_steps=steps,
                    guidance_scale=options.guidance,
                    seed=seed,
                )
                for seed, part in enumerate(asked.split(_BATCH))
            ]
            quality = assess(classifier, torch.cat(pieces), train_images, asked)
            label = f"{path.stem}, {name}, {steps}"
            print(row(label, quality, time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()

"""How well VAEs of the digits explain digits that they have not seen, and how legible and varied
those are that they draw.

    python -m benchmarks.vae_quality [MODEL ...]

Each model is a model.safetensors of `aigc-fast train vae`; by default those in docs/vae. The bounds
are of the 500 digits that no training saw, each pixel a Bernoulli variable of its grey. The judge
of samples is a small classifier that has seen the other 4,500 and nothing else.
"""

import argparse
from pathlib import Path

import torch

from aigc_fast.cli.sample_vae import samples_of
from aigc_fast.cli.vae_model import load_model
from aigc_fast.training import log_likelihood
from aigc_fast.training.quality import CONFIDENT, assess, train_classifier
from benchmarks.gan_quality import SAMPLES, digits, row

MODELS = Path(__file__).parent.parent / "docs" / "vae"
#: of the importance-weighted bound
_DRAWS = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", type=Path, default=sorted(MODELS.glob("*.safetensors"))
    )
    options = parser.parse_args()
    train_images, train_labels, images, labels = digits()
    models = {path: load_model(path, torch.device("cpu")) for path in options.models}

    print(f"| nats of {len(images)} digits held out | ELBO | {_DRAWS} draws |")
    print("|---|---|---|")
    for path, (model, config) in models.items():
        classes = None if config["num_classes"] is None else labels
        bounds = [
            log_likelihood(
                model, images, classes, samples=draws, likelihood=config["likelihood"],
                generator=torch.Generator().manual_seed(0),
            ).mean().item()
            for draws in (1, _DRAWS)
        ]  # fmt: skip
        print(f"| {path} | {bounds[0]:.1f} | {bounds[1]:.1f} |", flush=True)

    classifier = train_classifier(train_images, train_labels)
    print(f"\n| {SAMPLES} samples of | confident (> {CONFIDENT}) | classes | as asked | Fréchet |")
    print("|---|---|---|---|---|")
    print(row("real, held out", assess(classifier, images, train_images, labels)))
    for path, (model, config) in models.items():
        with torch.no_grad():
            samples, asked = samples_of(model, config, SAMPLES)
        print(row(str(path), assess(classifier, samples, train_images, asked)), flush=True)


if __name__ == "__main__":
    main()

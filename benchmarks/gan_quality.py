"""How legible and how varied the digits of trained GANs are.

    python -m benchmarks.gan_quality CHECKPOINT [CHECKPOINT ...]

Each checkpoint is one of `aigc-fast train gan`. A small classifier is trained on 4,500 real digits;
the other 500 show what it makes of digits that no generator made.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from aigc_fast.cli.sample_gan import load_generator, samples_of
from aigc_fast.io import load_digits
from aigc_fast.training.batches import as_floats
from aigc_fast.training.quality import CONFIDENT, DigitClassifier, Quality, assess, train_classifier

SAMPLES = 1000


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) to train on, then those held out: every tenth of each class."""
    images, labels = load_digits()
    images = as_floats(images[:, None])
    held_out = torch.arange(len(images)) % 10 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def row(name: str, quality: Quality) -> str:
    asked = "" if quality.as_asked is None else f"{quality.as_asked:.1%}"
    return (
        f"| {name} | {quality.confident:.1%} | {min(quality.classes):.1%} to "
        f"{max(quality.classes):.1%} | {asked} | {quality.frechet:.1f} |"
    )


def of_checkpoint(
    classifier: DigitClassifier, checkpoint: Path, real: Tensor, seed: int = 0
) -> Quality:
    images, labels = samples_of(
        *load_generator(checkpoint, torch.device("cpu")), SAMPLES, seed=seed
    )
    return assess(classifier, images, real, labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    options = parser.parse_args()
    train_images, train_labels, images, labels = digits()
    classifier = train_classifier(train_images, train_labels)
    accuracy = (classifier(images).argmax(1) == labels).float().mean().item()
    print(f"The classifier knows {accuracy:.1%} of {len(images)} real digits it has not seen.\n")
    print(f"| {SAMPLES} samples of | confident (> {CONFIDENT}) | classes | as asked | Fréchet |")
    print("|---|---|---|---|---|")
    print(row("real, held out", assess(classifier, images, train_images, labels)))
    noise = torch.rand(SAMPLES, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    print(row("noise", assess(classifier, noise, train_images)))
    for checkpoint in options.checkpoints:
        print(row(str(checkpoint), of_checkpoint(classifier, checkpoint, train_images)))


if __name__ == "__main__":
    main()

"""How good generated digits are, in the eyes of a classifier that has seen real ones alone."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast.nn import Conv2dBiasAct, LinearBiasAct

from .batches import batches
from .optim import Adam

#: A sample is legible if the classifier gives one class more than this probability.
CONFIDENT = 0.9


class DigitClassifier(nn.Module):
    """Images (batch, 1, 28, 28) in [-1, 1] to logits of ten classes, by way of 64 features."""

    def __init__(self) -> None:
        super().__init__()
        relu: dict[str, Any] = {"act": "relu", "gain": 1.0}
        self.body = nn.Sequential(
            Conv2dBiasAct(1, 24, 5, 2, 2, **relu),
            Conv2dBiasAct(24, 48, 3, 2, 1, **relu),
            Conv2dBiasAct(48, 96, 3, 2, 1, **relu),
            nn.Flatten(),
            LinearBiasAct(96 * 4 * 4, 64, **relu),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(images), 0.3, self.training))


def train_classifier(
    images: Tensor, labels: Tensor, *, epochs: int = 12, seed: int = 0
) -> DigitClassifier:
    """A classifier on the images' device, trained on them shifted by up to two pixels, to be
    robust."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    with images.device:
        classifier = DigitClassifier()
    optimizer = Adam(classifier.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch, names in batches(images, labels, batch_size=50, generator=random):
            shift = torch.randint(-2, 3, (2,), generator=random, device="cpu").tolist()
            logits = classifier(batch.roll(shift, (2, 3)))
            loss = F.cross_entropy(logits, names)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rate.step()
    return classifier.eval().requires_grad_(False)


@dataclass(frozen=True)
class Quality:
    """confident: share of samples that the classifier is sure of.
    classes:   share of each class among the samples.
    frechet:   distance of the samples' features to those of real images (`frechet_distance`).
    as_asked:  share whose class is the one asked for; None where none was.
    """

    confident: float
    classes: list[float]
    frechet: float
    as_asked: float | None


def assess(
    classifier: DigitClassifier, images: Tensor, real: Tensor, labels: Tensor | None = None
) -> Quality:
    """The quality of `images` beside the real ones; labels: the classes that were asked for."""
    probabilities = classifier(images).softmax(1)
    confidence, found = probabilities.max(1)
    return Quality(
        (confidence > CONFIDENT).float().mean().item(),
        (found.bincount(minlength=10) / len(found)).tolist(),
        frechet_distance(classifier.features(images), classifier.features(real)),
        None if labels is None else (found == labels).float().mean().item(),
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of the rows.

    a, b: (count, features). Source: Heusel et al. 2017, arXiv:1706.08500, there of Inception's
    features; figures of other features cannot be compared with those.
    """
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    common = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * common).item()

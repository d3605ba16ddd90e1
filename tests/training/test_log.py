"""TensorBoard's event files, as TensorBoard reads them."""

import sys

import numpy as np
import pytest

from aigc_fast.training import TensorBoardLog


def test_tensorboard_reads_numbers_and_pictures(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path, ["loss", "seconds"])
    for step in (1, 2, 3):
        log.add(step, 0.5 * step, step)
    log.add_picture(3, "samples", np.zeros((4, 6), np.uint8))
    log.close()
    log = TensorBoardLog(tmp_path, ["loss", "seconds"], last_step=2)  # the third was lost by a kill
    log.add(3, 7.0, 8.0)
    log.add_picture(3, "samples", np.zeros((5, 7, 3), np.uint8))
    log.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    rows = [(event.step, event.value) for event in events.Scalars("loss")]
    assert rows == [(1, 0.5), (2, 1.0), (3, 7.0)]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.height, picture.width) == (3, 5, 7)


def test_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path, ["loss"])

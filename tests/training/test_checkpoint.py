"""Checkpoints and logs under interruptions."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aigc_fast.io.hf_folder import write_hf_folder
from aigc_fast.training import CSVLog, load_checkpoint, save_checkpoint
from tests.full_disk import full_disk


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def fails(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}


@pytest.mark.parametrize("count", [100, 1_000, 40_000])  # seen by the writer now, later, at the end
@pytest.mark.parametrize("kind", ["checkpoint", "model"])
def test_a_full_disk_is_named(tmp_path, kind, count):
    tensors = {str(i): torch.zeros(count) for i in range(8)}
    name = {"checkpoint": "checkpoint.pt", "model": "model.safetensors"}[kind]
    with pytest.raises(OSError, match=f"/{name}") as caught, full_disk(3_000):
        if kind == "model":
            write_hf_folder(tmp_path, {}, tensors)
        else:
            save_checkpoint(tmp_path / name, tensors)
    assert "File too large" in str(caught.value) and not list(tmp_path.iterdir())


def test_killed_at_any_moment(tmp_path):
    path = tmp_path / "checkpoint.pt"
    code = (
        "import sys, torch\n"
        "from aigc_fast.training import save_checkpoint\n"
        "for step in range(10**6):\n"
        "    save_checkpoint(sys.argv[1], {'step': step, 'x': torch.full((300_000,), step)})\n"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(path)])
    try:
        deadline = time.monotonic() + 100
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(5):  # the file is whole whenever one looks
            state = load_checkpoint(path)
            assert (state["x"] == state["step"]).all()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    state = load_checkpoint(path)
    assert (state["x"] == state["step"]).all()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError):
        load_checkpoint(path)
    for content in (b"", b"PK\x03\x04", b"text", pickle.dumps(os.getcwd)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint"):
            load_checkpoint(path)
    save_checkpoint(path, [1])
    with pytest.raises(ValueError, match="it holds a list"):
        load_checkpoint(path)


def test_a_log_goes_on_after_the_step_of_the_checkpoint(tmp_path):
    log = CSVLog(tmp_path / "log.csv", ["loss"])
    for step in (1, 2, 3):
        log.add(step, step // 2 or 1 / 3)
    log.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4")  # killed while it wrote
    before = (tmp_path / "log.csv").read_text().splitlines()
    log = CSVLog(tmp_path / "log.csv", ["loss"], last_step=2)
    assert (tmp_path / "log.csv").read_text().splitlines() == before[:3]
    log.add(3, 0.5)
    assert log.read() == [[1, 0.333333], [2, 1], [3, 0.5]]
    log.close()
    assert CSVLog(tmp_path / "log.csv", ["loss"]).read() == []


def test_a_log_is_whole_while_it_is_taken_up(tmp_path, monkeypatch):
    log = CSVLog(tmp_path / "log.csv", ["loss"])
    for step in (1, 2, 3):
        log.add(step, 0.5)
    log.close()
    before = (tmp_path / "log.csv").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        CSVLog(tmp_path / "log.csv", ["loss"], 3)
    assert (tmp_path / "log.csv").read_text() == before

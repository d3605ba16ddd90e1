"""Checkpoints of vocoders: weight norm in its forms, and files that are not sound."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from aigc_fast.models.vocoder.checkpoint import fold_weight_norm, read_state
from tests.models.vocoders import GENERATORS, make


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("norm", ["old", "new"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoints_with_weight_norm(tmp_path, name, norm, suffix):
    """Named as they are published; BigVGAN's filters have the file's own values."""
    model = make(name, in_channels=5)
    want = {key: value.clone() for key, value in model.state_dict().items()}
    if norm == "new":
        for module in list(model.modules()):
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                parametrizations.weight_norm(module)
        state = model.state_dict()
    else:
        state = {}
        for key, value in want.items():
            if key.endswith("weight"):
                length = value.flatten(1).norm(dim=1).view(-1, 1, 1)
                state |= {f"{key}_g": length, f"{key}_v": value * 3}
            else:
                state[key] = value
    path = tmp_path / f"generator{suffix}"
    if suffix == ".pt":
        torch.save({"generator": state}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    cls, options = GENERATORS[name]
    config = options | dict(num_mels=5, resblock="1", fmax=None, learning_rate=0.0002)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = cls.from_pretrained(path)
    assert not loaded.training and loaded.state_dict().keys() == want.keys()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, want[key], rtol=3e-7, atol=0)
    x = torch.randn(1, 5, 7)
    with torch.no_grad():
        exact = model.double()(x.double())
        torch.testing.assert_close(loaded(x).double(), exact, rtol=0, atol=1e-5)
    half = cls.from_pretrained(path, dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}


def test_weight_norm_is_that_of_torch():
    conv = parametrizations.weight_norm(nn.Conv1d(3, 4, 5).double())
    state = {f"a.{name}": value for name, value in conv.state_dict().items()}
    state["a.parametrizations.weight.original0"] *= 3
    conv.parametrizations.weight.original0.data *= 3
    torch.testing.assert_close(fold_weight_norm(state)["a.weight"], conv.weight, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match=r"a\.weight_g and a\.weight_v one is missing"):
        fold_weight_norm({"a.weight_v": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"the shapes of a\.weight_g and a\.weight_v: \(3,\)"):
        fold_weight_norm({"a.weight_v": torch.ones(3, 2), "a.weight_g": torch.ones(3)})


class _Evil:
    def __reduce__(self):
        return print, ("run",)


def test_hostile_checkpoints(tmp_path, capsys):
    path = tmp_path / "g.pt"
    cases = {
        "more than tensors": {"generator": _Evil()},
        "must hold a state dict, got list": [torch.ones(1)],
        "'x' must be a floating-point tensor": {"generator": {"x": 3}},
        "'y' must be a floating-point tensor": {"y": torch.ones(1, dtype=torch.int64)},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"g.pt: .*{message}"):
            read_state(path, "generator")
    assert "run" not in capsys.readouterr().out
    torch.save({"generator": {"x": torch.ones(50)}}, path)
    content = path.read_bytes()
    for end in (0, 5, 40, len(content) // 2):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"g\.pt: "):
            read_state(path, "generator")
    with pytest.raises(OSError):
        read_state(tmp_path / "none.pt", "generator")
    with pytest.raises(ValueError, match=r"g\.safetensors: not a sound"):
        (tmp_path / "g.safetensors").write_bytes(content)
        read_state(tmp_path / "g.safetensors", "generator")

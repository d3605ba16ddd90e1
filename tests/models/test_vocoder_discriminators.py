"""The discriminators of vocoders beside plain torch, and the published file of their weights."""

import pytest
import torch

from aigc_fast.models.vocoder import VocoderDiscriminator
from tests.models.plain_discriminators import MultiPeriod, MultiResolution, MultiScale


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return {"mpd": MultiPeriod(4).double(), "msd": MultiScale(16).double()}


def published(path, plain, **more):
    """As the authors' `do_*` files are: with the states of optimizers, and a step."""
    state = {name: network.state_dict() for name, network in plain.items()}
    torch.save({**state, "optim_g": {"state": {}}, "steps": 7, **more}, path)
    return path


def test_a_published_file_loads_and_gives_the_same(plain, tmp_path):
    ours = VocoderDiscriminator(4).double()
    ours.load_published(published(tmp_path / "do_00000007", plain))
    x = torch.randn(2, 1, 1501).double()  # no multiple of any period
    for network in (ours, *plain.values()):
        network.eval()  # a power iteration would move what the next test reads
    found, wanted = ours(x), [part for network in plain.values() for part in network(x)]
    assert [len(features) for features in found] == [6] * 5 + [8] * 3
    for ours_, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_plain_torch(plain, tmp_path):
    ours = VocoderDiscriminator(4).double()
    ours.load_published(published(tmp_path / "do", plain))
    ours.train()
    x = torch.randn(1, 1, 1024).double().requires_grad_()
    for network in plain.values():
        network.train()  # both run a power iteration from the same vectors
    got = torch.autograd.grad(sum(f.square().sum() for part in ours(x) for f in part), x)
    parts = [part for network in plain.values() for part in network(x)]
    want = torch.autograd.grad(sum(f.square().sum() for part in parts for f in part), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_published_size():
    with torch.device("meta"):
        ours, plain = VocoderDiscriminator(), (MultiPeriod(32), MultiScale(128))
    counts = [sum(p.numel() for p in n.parameters()) for n in (ours, *plain)]
    assert [round(count / 1e6, 1) for count in counts] == [70.7, 41.1, 29.6]


def test_those_of_bigvgan_too(tmp_path):
    torch.manual_seed(0)
    plain = {"mpd": MultiPeriod(4), "mrd": MultiResolution(4)}
    ours = VocoderDiscriminator(4, "bigvgan")
    ours.load_published(published(tmp_path / "do", plain))
    x = torch.randn(2, 1, 2400) * 0.1
    found, wanted = ours(x), [part for network in plain.values() for part in network(x)]
    assert [len(features) for features in found] == [6] * 8
    for ours_, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs)
    silent = torch.zeros(1, 1, 2400, requires_grad=True)
    total = sum(features[-1].sum() for features in ours(silent))
    assert torch.autograd.grad(total, silent)[0].isfinite().all()
    with pytest.raises(ValueError, match="not such discriminators: 'msd'"):
        VocoderDiscriminator(4).load_published(tmp_path / "do")
    with pytest.raises(ValueError, match="kind must be one of hifigan, bigvgan"):
        VocoderDiscriminator(4, "wavegan")


@pytest.mark.parametrize("lacking", ["mpd", "msd"])
def test_other_files_are_refused(plain, tmp_path, lacking):
    with pytest.raises(ValueError, match="channels must be a multiple of 4, got 6"):
        VocoderDiscriminator(6)
    path = published(tmp_path / "do", plain, **{lacking: {}})
    with pytest.raises(ValueError, match="do: not such discriminators"):
        VocoderDiscriminator(4).load_published(path)
    with pytest.raises(ValueError, match="not such discriminators"):
        VocoderDiscriminator(8).load_published(published(path, plain))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="do"):
        VocoderDiscriminator(4).load_published(path)

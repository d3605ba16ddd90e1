"""HiFi-GAN's compiled convolutions: which calls take them, and what parts of a sequence give."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_fast._devices import has_bfloat16_instructions
from aigc_fast.models.vocoder import HiFiGANGenerator, hifigan
from tests.models.checkpoints import assert_error_ratio


class Convolutions(TorchDispatchMode):
    """Keeps the names of the convolutions that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in str(func):
            self.names.add(str(func.overloadpacket))
        return func(*args, **kwargs or {})


OURS = {"aigc_fast.conv1d", "aigc_fast.conv_transpose1d"}


def generator(**options):
    return HiFiGANGenerator((4, 2), (8, 4), 32, in_channels=6, **options).eval()


def convolutions_of(model, x):
    with Convolutions() as seen:
        y = model(x)
    return y, seen.names


def test_compiled_where_no_gradient_is_wanted():
    model, x = generator(), torch.randn(1, 6, 20)
    stock, names = convolutions_of(model, x)
    assert names == {"aten.convolution"} and stock.requires_grad
    with torch.no_grad():
        _, names = convolutions_of(model, x)
        assert names == OURS
        _, names = convolutions_of(model.bfloat16(), x.bfloat16())
        assert names == (OURS if has_bfloat16_instructions() else {"aten.convolution"})
        _, names = convolutions_of(model.half(), x.half())
        assert names == {"aten.convolution"}
    model = generator()
    exact = model.double()(x.double()).detach()
    stock = model.float()(x).detach()
    with torch.no_grad():
        assert_error_ratio(model(x), stock, exact)


@pytest.mark.parametrize("options", [dict(), dict(resblock="2"), dict(bias=False)])
@pytest.mark.parametrize("frames", [1, 7, 150])
def test_parts_are_the_same_to_the_bit(monkeypatch, options, frames):
    model, x = generator(**options), torch.randn(2, 6, frames)
    stages = []
    stage = HiFiGANGenerator._stage
    monkeypatch.setattr(
        HiFiGANGenerator, "_stage", lambda self, x, i: stages.append(i) or stage(self, x, i)
    )
    with torch.no_grad():
        monkeypatch.setattr(hifigan, "PART", 1 << 60)
        whole = model(x)
        assert stages == [0, 1]
        monkeypatch.setattr(hifigan, "PART", 1)
        assert model(x).equal(whole)
    assert (len(stages) > 4) == (frames == 150)

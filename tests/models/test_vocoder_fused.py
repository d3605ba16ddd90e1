"""Vocoders' compiled convolutions: which calls take them, and what parts of a sequence give."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_fast._devices import has_bfloat16_instructions, torch_multiplies
from aigc_fast.models.vocoder import generator
from aigc_fast.nn import _conv1d, _upsampling
from tests.models import vocoders
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


class Orders(TorchDispatchMode):
    """Keeps whether channels are innermost in what each of our operators reads."""

    def __init__(self):
        super().__init__()
        self.innermost = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "aigc_fast" in str(func):
            self.innermost.append(args[0].stride(1) == 1)
        return func(*args, **kwargs or {})


OURS = {"aigc_fast.conv1d", "aigc_fast.conv_transpose1d"}


def make(name, **options):
    wide = dict(
        upsample_initial_channel=32,
        resblock_kernel_sizes=(3, 7, 11),
        resblock_dilation_sizes=((1, 3, 5),) * 3,
    )
    return vocoders.make(name, **wide | options)


def convolutions_of(model, x):
    with Convolutions() as seen:
        y = model(x)
    return y, seen.names


@pytest.mark.parametrize("name", vocoders.GENERATORS)
def test_compiled_where_not_slower(name):
    model, x = make(name), torch.randn(1, 6, 20)
    y, names = convolutions_of(model, x)
    assert names == OURS and y.requires_grad
    with Convolutions() as seen:
        y.sum().backward()
    assert seen.names == OURS | {"aigc_fast.conv1d_backward_weight"}
    with torch.no_grad():
        _, names = convolutions_of(model, x)
        assert names == OURS
        _, names = convolutions_of(model.bfloat16(), x.bfloat16())
        assert names == (OURS if has_bfloat16_instructions() else {"aten.convolution"})
        _, names = convolutions_of(model.half(), x.half())
        assert names == (OURS if not torch_multiplies(torch.float16) else {"aten.convolution"})
    with torch.autocast("cpu", torch.bfloat16):
        _, names = convolutions_of(make(name), x)
        assert names == {"aten.convolution"}


@pytest.mark.parametrize("name", vocoders.GENERATORS)
def test_as_good_as_torchs(monkeypatch, name):
    def derivatives(model, x):
        """The waveform and all gradients, in units of the largest of each."""
        y = model(x)
        found = [y, *torch.autograd.grad(y.square().mean(), model.parameters())]
        return torch.cat([(t / u).detach().flatten() for t, u in zip(found, units, strict=True)])

    model, x = make(name), torch.randn(1, 6, 20)
    wide = copy.deepcopy(model).double()
    y = wide(x.double())
    found = torch.autograd.grad(y.square().mean(), wide.parameters())
    units = [y.abs().max().item(), *(t.abs().max().item() for t in found)]
    ours = derivatives(model, x)
    monkeypatch.setattr(_conv1d, "is_compiled", lambda conv: False)
    assert_error_ratio(ours, derivatives(model, x), derivatives(wide, x.double()))


@pytest.mark.parametrize(
    "name, options",
    [
        ("hifigan", dict()),
        ("hifigan", dict(resblock="2")),
        ("hifigan", dict(bias=False)),
        ("bigvgan", dict()),
        ("bigvgan", dict(resblock="2", activation="snake", use_tanh_at_final=False)),
    ],
)
@pytest.mark.parametrize("frames", [1, 7, 150])
def test_parts_are_the_same_to_the_bit(monkeypatch, name, options, frames):
    model, x = make(name, **options), torch.randn(2, 6, frames)
    stages = []
    stage = generator.Generator._stage
    monkeypatch.setattr(
        generator.Generator, "_stage", lambda self, x, i: stages.append(i) or stage(self, x, i)
    )
    with torch.no_grad():
        monkeypatch.setattr(_upsampling, "PART", 1 << 60)
        whole = model(x)
        assert stages == [0, 1]
        monkeypatch.setattr(_upsampling, "PART", 1)
        assert model(x).equal(whole)
    assert (len(stages) > 4) == (frames == 150)


@pytest.mark.parametrize("name", vocoders.GENERATORS)
@pytest.mark.parametrize("part", [1, 1 << 60])
def test_nothing_is_reordered(monkeypatch, name, part):
    """After the first convolution channels stay innermost, whole or in parts."""
    monkeypatch.setattr(_upsampling, "PART", part)
    model = make(name)
    with torch.no_grad(), Orders() as seen:
        model(torch.randn(2, 6, 150))
    assert len(seen.innermost) > 20 and seen.innermost[0] is False and all(seen.innermost[1:])


@pytest.mark.parametrize("name", vocoders.GENERATORS)
def test_gradients(name):
    model = vocoders.make(name, resblock="2").double().train()
    x = torch.randn(1, 6, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(model, (x,))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

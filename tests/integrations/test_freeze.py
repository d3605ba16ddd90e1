"""aigc_fast.patch(model, freeze=True): weights of convolutions that are packed once."""

import copy
import pickle

import pytest
import torch
from torch import nn

import aigc_fast
from aigc_fast._devices import has_bfloat16_instructions
from aigc_fast.integrations import _packed
from tests.ops.test_every_op import assert_as_good_as_torch

pytest.importorskip("diffusers")

from tests.integrations.coming_back import snapshot
from tests.integrations.diffusers_zoo import exact, gradients, inputs_of, make, outputs
from tests.integrations.test_diffusers_models import (
    CONVOLUTIONAL,
    EVERY_DTYPE,
    assert_error_ratio,
)

EVERY_ORDER = pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"]
)


def packed_of(model):
    """All but the convolutions whose work an upsampling does."""
    idle = {m.conv for m in model.modules() if "_packed" in vars(m) and hasattr(m, "conv")}
    return [m._packed for m in model.modules() if "_packed" in vars(m) and m not in idle]


def one(inputs):
    return {key: value[:1] for key, value in inputs.items()}


@EVERY_ORDER
@EVERY_DTYPE
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_is_as_good_as_stock(name, dtype, order, monkeypatch) -> None:
    monkeypatch.setattr(_packed, "_PIXELS_OF_WINOGRAD", 1024)
    model, inputs = make(name, dtype).to(memory_format=order), inputs_of(name, dtype)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=order)
    want, stock = exact(outputs, model, inputs), outputs(model, inputs)
    aigc_fast.patch(model, freeze=True)
    ours = outputs(model, inputs)
    assert_as_good_as_torch(ours, stock, want, dtype)
    assert ours[0].stride() == stock[0].stride()
    packed = packed_of(model)
    runs = dtype is torch.float32 or has_bfloat16_instructions()
    assert packed and all((p._kept is not None) == runs for p in packed)
    kept = [p._kept for p in packed]
    assert torch.equal(outputs(model, inputs)[0], ours[0])
    assert all(p._kept is k for p, k in zip(packed, kept, strict=True))  # packed once


def test_more_pixels_are_not_packed() -> None:
    model, inputs = make("unet"), one(inputs_of("unet"))
    inputs["sample"] = torch.randn(1, 3, 128, 128)
    stock = outputs(model, inputs)
    aigc_fast.patch(model, freeze=True)
    torch.testing.assert_close(outputs(model, inputs), stock)
    few = model.mid_block.resnets[0].conv1  # 64 x 64
    assert few._packed._kept is None and model.conv_in._packed._kept is None


def test_gradients_are_those_of_the_patched_model() -> None:
    model, inputs = make("unet"), inputs_of("unet")
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    aigc_fast.patch(model, freeze=True)
    outputs(model, inputs)  # no gradient wanted: packs
    assert_error_ratio(gradients(model, inputs), stock, want, torch.float32)


def scaled(model):
    return {key: 1.5 * value for key, value in model.state_dict().items()}


def write(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def write_data(model) -> None:
    for parameter in model.parameters():
        parameter.data *= 1.5


def write_middle(model) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data[:, :, 1:, 1:] *= 1.5


def replace(model) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(1.5 * module.weight.detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(scaled(model)),
        lambda model: model.load_state_dict(scaled(model), assign=True),
        write,
        write_data,
        write_middle,
        replace,
        lambda model: model.double().float().to(memory_format=torch.channels_last),
    ],
    ids=["load", "assign", "write", "write_data", "write_middle", "replace", "move"],
)
def test_a_changed_weight_is_packed_anew(change) -> None:
    model, inputs = make("unet"), one(inputs_of("unet"))
    aigc_fast.patch(model, freeze=True)
    outputs(model, inputs)
    assert any(p._kept for p in packed_of(model))
    change(model)
    ours = outputs(model, inputs)
    aigc_fast.unpatch(model)
    torch.testing.assert_close(ours, outputs(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["meta", torch.bfloat16], ids=str)
def test_what_is_moved_keeps_no_copies(to) -> None:
    model, inputs = make("unet"), one(inputs_of("unet"))
    aigc_fast.patch(model, freeze=True)
    outputs(model, inputs)
    assert any(p._kept for p in packed_of(model))
    model.to(to)
    assert not any(p._kept for p in packed_of(model))


def test_everything_comes_back_and_copies_pack_for_themselves() -> None:
    model, inputs = make("unet"), inputs_of("unet")
    before, keys = snapshot(model), list(model.state_dict())
    report = aigc_fast.patch(model, freeze=True)
    assert "packed once" in str(report) and list(model.state_dict()) == keys
    want = outputs(model, inputs)
    assert aigc_fast.patch(model, freeze=True) == report
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(p._kept for p in packed_of(twin))
        assert torch.equal(outputs(twin, inputs)[0], want[0])
        aigc_fast.unpatch(twin)
        assert not packed_of(twin)
    aigc_fast.unpatch(model)
    assert snapshot(model) == before


def test_another_border_since() -> None:
    model, inputs = make("unet"), one(inputs_of("unet"))
    aigc_fast.patch(model, freeze=True)
    outputs(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    ours = outputs(model, inputs)
    aigc_fast.unpatch(model)
    torch.testing.assert_close(ours, outputs(model, inputs), rtol=1e-4, atol=1e-5)


def test_parametrized_since() -> None:
    model, inputs = make("unet"), one(inputs_of("unet"))
    want = outputs(model, inputs)
    aigc_fast.patch(model, freeze=True)
    nn.utils.parametrizations.weight_norm(model.conv_in)
    for _ in range(2):
        torch.testing.assert_close(outputs(model, inputs), want, rtol=1e-4, atol=1e-5)
        aigc_fast.unpatch(model)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3, padding="same"), "a padding in words"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "another border"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_convolutions_stay(conv, why) -> None:
    model = make("unet")
    model.conv_in = conv
    aigc_fast.patch(model, freeze=True)
    assert type(conv) is nn.Conv2d

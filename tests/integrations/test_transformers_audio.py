"""aigc_fast.patch on transformers' vocoders and audio codec, beside the same models unpatched."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import aigc_fast
from aigc_fast._devices import has_bfloat16_instructions, torch_multiplies
from aigc_fast.integrations import transformers_audio
from aigc_fast.integrations._patching import Replacement
from aigc_fast.nn import _upsampling
from tests.ops.test_every_op import assert_as_good_as_torch, recorded

transformers = pytest.importorskip("transformers")

from tests.integrations.coming_back import everything_comes_back

GENERATOR = dict(
    upsample_initial_channel=32,
    upsample_rates=[4, 2],
    upsample_kernel_sizes=[8, 4],
    resblock_kernel_sizes=[3, 5],
    resblock_dilation_sizes=[[1, 3], [1, 2]],
)
UNEVEN = dict(upsample_kernel_sizes=[7, 3])  # one step more than the rate times as many
DAC = dict(
    encoder_hidden_size=8, downsampling_ratios=[2, 3], decoder_hidden_size=32, n_codebooks=2,
    codebook_size=16, codebook_dim=4,
)  # fmt: skip
CONVOLUTIONS = {"conv1d", "conv_transpose1d"}
#: name: its class, what its config has beside the sizes of generators, operators of inference
MODELS = {
    "speecht5": ("SpeechT5HifiGan", dict(model_in_dim=6), CONVOLUTIONS),
    "speecht5, uneven": ("SpeechT5HifiGan", dict(model_in_dim=6, **UNEVEN), CONVOLUTIONS),
    "fastspeech2": (
        "FastSpeech2ConformerHifiGan",
        dict(model_in_dim=6, normalize_before=False, leaky_relu_slope=0.3),
        CONVOLUTIONS,
    ),
    "vits": ("VitsModel", dict(flow_size=6, hidden_size=16), CONVOLUTIONS),
    "vits, speakers": (
        "VitsModel",
        dict(flow_size=6, hidden_size=16, num_speakers=3, speaker_embedding_size=5),
        CONVOLUTIONS,
    ),
    "dac": ("DacModel", DAC, CONVOLUTIONS | {"snake"}),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def make(name, dtype=torch.float32):
    """With weights that make activations near one, also where snakes and residuals add to them."""
    cls, options, _ = MODELS[name]
    options = options if name == "dac" else GENERATOR | options
    torch.manual_seed(0)
    model = getattr(transformers, cls)(
        getattr(transformers, cls.replace("Model", "") + "Config")(**options)
    )
    with torch.no_grad():
        for module in model.modules():
            if type(module) in (nn.Conv1d, nn.ConvTranspose1d):
                std = module.weight[0].numel() ** -0.5
                nn.init.normal_(module.weight, std=std / 2 if name == "dac" else std)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
            if hasattr(module, "alpha"):
                nn.init.uniform_(module.alpha, 0.5, 2)
        if hasattr(model, "scale"):
            model.mean.normal_()
            model.scale.uniform_(1, 2)
    return model.eval().to(dtype)


def inputs_of(name, dtype=torch.float32, length=23):
    generator = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    if name == "dac":
        return randn(2, 1, 6 * length), randn(2, 32, length)
    if "vits" in name:
        return (randn(2, 6, length), *([randn(2, 5, 1)] if "speakers" in name else []))
    return (randn(2, length, 6),)


def outputs(model, inputs):
    if hasattr(model, "encoder") and hasattr(model, "quantizer"):
        return [model.encoder(inputs[0]), model.decoder(inputs[1])]
    return [getattr(model, "decoder", model)(*inputs)]


def exact(function, model, inputs):
    return function(copy.deepcopy(model).double(), [x.double() for x in inputs])


def assert_as_good_as_unpatched(model, inputs) -> None:
    ours = outputs(model, inputs)
    aigc_fast.unpatch(model)
    want, stock = exact(outputs, model, inputs), outputs(model, inputs)
    assert_as_good_as_torch(ours, stock, want, torch.float32)


def operators_of(calls):
    names = {op.name.removesuffix("_full") for op, _ in calls}
    return {name for name in names if "backward" not in name}


@pytest.mark.parametrize("part", [1, 1 << 60], ids=["parts", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_MODEL
@torch.no_grad()
def test_outputs_are_as_good_as_stock(monkeypatch, name, dtype, part) -> None:
    monkeypatch.setattr(_upsampling, "PART", part)
    model, inputs = make(name, dtype), inputs_of(name, dtype, length=101)
    want, stock = exact(outputs, model, inputs), outputs(model, inputs)
    aigc_fast.patch(model)
    with recorded() as calls:
        ours = outputs(model, inputs)
    assert_as_good_as_torch(ours, stock, want, dtype)
    assert all(y.is_contiguous() for y in ours)
    fused = {
        torch.float32: True,
        torch.bfloat16: has_bfloat16_instructions(),
        torch.float16: not torch_multiplies(torch.float16),
    }[dtype]
    assert operators_of(calls) == (MODELS[name][2] if fused else MODELS[name][2] - CONVOLUTIONS)
    if name != "dac":
        assert (sum(op.name == "conv_transpose1d" for op, _ in calls) > 2) == (fused and part == 1)


@pytest.mark.parametrize("length", [1, 2, 150])
@EVERY_MODEL
@torch.no_grad()
def test_parts_are_the_same_to_the_bit(monkeypatch, name, length) -> None:
    model, inputs = make(name), inputs_of(name, length=length)
    aigc_fast.patch(model)
    whole = outputs(model, inputs)
    monkeypatch.setattr(_upsampling, "PART", 1)
    assert all(map(torch.equal, outputs(model, inputs), whole))


@pytest.mark.parametrize("name", ["speecht5", "vits"])
@torch.no_grad()
def test_a_block_without_a_batch(name) -> None:
    model, x = make(name), torch.randn(16, 9)
    block = getattr(model, "decoder", model).resblocks[0]
    want = block(x)
    assert aigc_fast.patch(block).replaced == {"HifiGanResidualBlock": (1, "conv1d")}
    assert torch.equal(block(x), want)
    torch.testing.assert_close(block(x[None])[0], want)


@torch.inference_mode()
def test_one_spectrogram_without_a_batch() -> None:
    model, (frames,) = make("speecht5"), inputs_of("speecht5")
    stock, want = model(frames[0]), exact(lambda m, x: m(x[0][0]), model, [frames])
    aigc_fast.patch(model)
    with recorded() as calls:
        ours = model(frames[0])
    assert_as_good_as_torch([ours], [stock], [want], torch.float32)
    assert operators_of(calls) == CONVOLUTIONS
    with pytest.raises(IndexError):  # the stock code's
        model(frames[0, 0])


@torch.no_grad()
def test_a_whole_vits() -> None:
    model = make("vits")
    model.noise_scale = model.noise_scale_duration = 0.0
    ids = torch.arange(12).view(1, -1)
    want, stock = exact(lambda m, _: m(ids).waveform, model, []), model(ids).waveform
    aigc_fast.patch(model)
    with recorded() as calls:
        ours = model(ids).waveform
    assert_as_good_as_torch([ours], [stock], [want], torch.float32)
    assert operators_of(calls) >= CONVOLUTIONS


@torch.no_grad()
def test_a_whole_dac() -> None:
    model, (sound, _) = make("dac"), inputs_of("dac")
    stock = model(sound)
    aigc_fast.patch(model)
    ours = model(sound)
    assert torch.equal(ours.audio_codes, stock.audio_codes)
    torch.testing.assert_close(ours.audio_values, stock.audio_values)


def gradients(model, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    found = outputs(model, inputs)
    of = [*inputs, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(sum(y.square().sum() for y in found), of, allow_unused=True)
    return [y.detach() for y in found] + [g for g in grads if g is not None]


@EVERY_MODEL
def test_gradients(name) -> None:
    model, inputs = make(name), inputs_of(name)
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    aigc_fast.patch(model.train())
    with recorded() as calls:
        ours = gradients(model, inputs)
    assert operators_of(calls) == MODELS[name][2]
    # Over all of them, in units of the largest value of each: single ones are luck on either side.
    units = [e.abs().max() for e in want]
    error, limit = (
        sum(((g - e) / unit).square().sum() for g, e, unit in zip(found, want, units, strict=True))
        for found in (ours, stock)
    )
    assert error.sqrt() <= 2 * limit.sqrt()


@EVERY_MODEL
def test_everything_comes_back(name) -> None:
    with everything_comes_back(make(name)) as report:
        texts = (text.replace(",", "") for _, text in report.replaced.values())
        assert MODELS[name][2] <= {word for text in texts for word in text.split()}


@EVERY_MODEL
@torch.no_grad()
def test_copies_are_patched_and_can_be_unpatched(name) -> None:
    model, inputs = make(name), inputs_of(name)
    stock = outputs(model, inputs)
    aigc_fast.patch(model)
    want = outputs(model, inputs)
    twins = [copy.deepcopy(model)]
    if "vits" not in name:  # whose flow is parametrized, which torch does not pickle
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert all(map(torch.equal, outputs(twin, inputs), want))
        aigc_fast.unpatch(twin)
        assert all(map(torch.equal, outputs(twin, inputs), stock))
    assert all(map(torch.equal, outputs(model, inputs), want))


@pytest.mark.parametrize("name", ["speecht5", "vits", "dac"])
@torch.no_grad()
def test_no_new_graph_breaks(name) -> None:
    model, inputs = make(name), inputs_of(name)

    def breaks():
        torch._dynamo.reset()
        found = torch._dynamo.explain(lambda: outputs(model, inputs))()
        return found.graph_break_count, found.graph_count

    before = breaks()
    aigc_fast.patch(model)
    assert breaks() == before
    torch._dynamo.reset()


# ---- where the stock code runs -------------------------------------------------------------------


@EVERY_MODEL
@torch.no_grad()
def test_autocast(name) -> None:
    model, inputs = make(name), inputs_of(name)
    want = exact(outputs, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs(model, inputs)
        aigc_fast.patch(model)
        with recorded() as calls:
            ours = outputs(model, inputs)
    assert not CONVOLUTIONS & operators_of(calls)
    assert_as_good_as_torch(ours, stock, want, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", ["speecht5", "vits, speakers"])
@torch.no_grad()
def test_a_trace_holds_for_other_lengths(name) -> None:
    model = make(name)
    generator = getattr(model, "decoder", model)
    aigc_fast.patch(model)
    traced = torch.jit.trace(generator, inputs_of(name, length=9), check_trace=False)
    longer = inputs_of(name, length=70)
    torch.testing.assert_close(traced(*longer), generator(*longer))


def layers_of(model):
    """One convolution of each kind, by the name of its parent and its place there."""
    if hasattr(model, "quantizer"):
        block, encoder_block = model.decoder.block[0], model.encoder.block[0]
        return [(block, "conv_t1"), (block.res_unit1, "conv1"), (encoder_block, "conv1")]
    generator = getattr(model, "decoder", model)
    blocks = generator.resblocks
    return [(generator, "conv_post"), (generator.upsampler, "1"), (blocks[1].convs1, "1")]


@pytest.mark.parametrize("on", ["convolutions", "blocks"])
@EVERY_MODEL
@torch.no_grad()
def test_hooks_run(name, on) -> None:
    model, inputs = make(name), inputs_of(name)
    blocks = ("HifiGanResidualBlock", "DacResidualUnit", "Snake1d")
    watched = [m for m in model.modules() if type(m).__name__ in blocks]
    if on == "convolutions":
        watched = [getattr(parent, child) for parent, child in layers_of(model)]
    seen = []
    handles = [
        m.register_forward_hook(lambda m, _, y: seen.append((m, y.clone()))) for m in watched
    ]

    def run():
        seen.clear()
        outputs(model, inputs)
        modules, found = zip(*seen, strict=True)
        return modules, list(found)

    exact(outputs, model, inputs)
    want = [y for _, y in seen]
    stock_order, stock = run()
    aigc_fast.patch(model)
    order, ours = run()
    assert order == stock_order and len(order) >= len(watched)
    assert_as_good_as_torch(ours, stock, want, torch.float32)
    for handle in handles:
        handle.remove()
    with recorded() as calls:
        outputs(model, inputs)
    assert operators_of(calls) == MODELS[name][2]


class Adapted(nn.Conv1d):
    """A subclass put in the place of a convolution, as adapters of some libraries are."""

    def forward(self, x):
        return super().forward(x) * 2


WAYS = {
    "weight_norm": weight_norm,
    "parametrized": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("first", ["patch", "norm"])
@pytest.mark.parametrize("way", WAYS)
@EVERY_MODEL
def test_weights_that_are_computed_stay_up_to_date(name, way, first) -> None:
    model, inputs = make(name), inputs_of(name)
    if first == "patch":
        aigc_fast.patch(model)
    for parent, child in layers_of(model):
        WAYS[way](getattr(parent, child))
    if first == "norm":
        aigc_fast.patch(model)
    with torch.no_grad():
        outputs(model, inputs)
        for parameter in model.parameters():
            parameter.mul_(1.25)
        assert_as_good_as_unpatched(model, inputs)


@EVERY_MODEL
@torch.no_grad()
def test_adapters(name) -> None:
    model, inputs = make(name), inputs_of(name)
    aigc_fast.patch(model)
    parent, child = layers_of(model)[2]
    old = getattr(parent, child)
    size = old.kernel_size[0], old.stride[0], old.padding[0], old.dilation[0]
    new = Adapted(old.in_channels, old.out_channels, *size)
    new.load_state_dict(old.state_dict())
    setattr(parent, child, new)
    assert_as_good_as_unpatched(model, inputs)


@torch.no_grad()
def test_a_block_of_ones_own() -> None:
    class Mine(nn.Module):
        def forward(self, x):
            return x + 1

    for name in ("speecht5", "vits"):
        model, inputs = make(name), inputs_of(name)
        generator = getattr(model, "decoder", model)
        generator.resblocks[2] = Mine()
        stock = outputs(model, inputs)
        assert aigc_fast.patch(model).replaced["HifiGanResidualBlock"] == (3, "conv1d")
        torch.testing.assert_close(outputs(model, inputs), stock)


def test_what_does_not_fit_is_kept_and_reported(monkeypatch) -> None:
    model = make("dac")
    model.decoder.block[1].conv_t1 = nn.Identity()
    monkeypatch.setattr(transformers_audio, "WIDE", 32)
    report = aigc_fast.patch(model)
    _, why = report.kept["DacDecoderBlock"]
    assert why == "torch's convolutions of 32 channels are faster; its convolution is Identity"
    assert report.replaced["DacEncoderBlock"] == (2, "conv1d")
    assert report.replaced["Snake1d"][1] == "snake"
    assert not isinstance(model.decoder.block[0], Replacement)

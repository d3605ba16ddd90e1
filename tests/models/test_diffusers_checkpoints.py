"""UNet and DiT with the weights of diffusers' models, beside those models."""

import shutil

import pytest
import torch
from torch import nn

from aigc_fast.models.diffusion import DiT, UNet, sample_images
from aigc_fast.schedulers import DDIMScheduler

pytest.importorskip("diffusers")

from tests.integrations.diffusers_zoo import (
    CASES,
    UNET,
    Case,
    exact,
    gradients,
    image,
    inputs_of,
    make,
    outputs,
)
from tests.integrations.test_diffusers_models import assert_error_ratio

LEVELS = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
MORE = {
    # as google/ddpm-cifar10-32: no padding, heads as wide as the level
    "unet, ddpm": Case(
        "UNet2DModel",
        UNET
        | dict(
            block_out_channels=(16, 32, 32),
            down_block_types=LEVELS,
            up_block_types=[kind.replace("Down", "Up") for kind in LEVELS[::-1]],
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            mid_block_scale_factor=1.5,
        ),
        CASES["unet"].inputs,
        set(),
    ),
    # as Stable Diffusion 2: layers, heads and context that differ from level to level; odd sizes
    "unet with text, uneven": Case(
        "UNet2DConditionModel",
        CASES["unet with text"].options
        | dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=(2, 1),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            num_class_embeds=4,
        ),
        lambda: (
            CASES["unet with text"].inputs()
            | dict(sample=image(4)[..., :7], class_labels=torch.tensor([3, 1]))
        ),
        set(),
    ),
}
NAMES = ["unet", "unet, modulated", "unet with text", "dit", *MORE]


@pytest.fixture(autouse=True)
def _more_cases(monkeypatch) -> None:
    for name, case in MORE.items():
        monkeypatch.setitem(CASES, name, case)


class AsDiffusers(nn.Module):
    """Ours, called as diffusers' are."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, timestep, class_labels=None, encoder_hidden_states=None, **sample):
        text = {} if encoder_hidden_states is None else {"text": encoder_hidden_states}
        (x,) = sample.values()
        return type("Output", (), {"sample": self.model(x, timestep, class_labels, **text)})


def ours_of(model):
    cls = DiT if "DiT" in type(model).__name__ else UNet
    return cls.from_diffusers(model.config, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_good_as_diffusers(name, dtype) -> None:
    model, inputs = make(name, dtype), inputs_of(name, dtype)
    ours = ours_of(model)
    keys = [key for key, _ in model.named_parameters()]
    assert set(ours.state_dict()) == set(keys)
    parameters = dict(ours.named_parameters())
    wrapped = AsDiffusers(ours)
    # The gradients in diffusers' order.
    wrapped.parameters = lambda: (parameters[key] for key in keys)
    want, theirs = exact(gradients, model, inputs), gradients(model, inputs)
    assert_error_ratio(gradients(wrapped, inputs), theirs, want, dtype)


@pytest.mark.parametrize("name", ["unet, modulated", "unet, ddpm"])
def test_channels_last(name) -> None:
    model, inputs = make(name), inputs_of(name)
    want, theirs = exact(outputs, model, inputs), outputs(model, inputs)
    ours = AsDiffusers(ours_of(model)).to(memory_format=torch.channels_last)
    assert_error_ratio(outputs(ours, inputs), theirs, want, torch.float32)


def save(name, folder):
    model = make(name)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_from_a_folder(name, tmp_path) -> None:
    model, cls = save(name, tmp_path), DiT if name == "dit" else UNet
    loaded = cls.from_pretrained(tmp_path)
    for key, value in ours_of(model).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert next(cls.from_pretrained(tmp_path, torch.bfloat16).parameters()).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(
        cls.from_pretrained(tmp_path / "shards").state_dict()[key], loaded.state_dict()[key]
    )


def test_attention_of_early_checkpoints() -> None:
    model = make("unet")
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, old in early.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert not any("to_q" in key for key in state)
    ours, want = UNet.from_diffusers(model.config, state), ours_of(model)
    assert all(torch.equal(want.state_dict()[k], v) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("conv_in.bias"), "tensor 'conv_in.bias' is missing"),
        (
            lambda state: state.update({"conv_in.bias": torch.zeros(3)}),
            r"tensor 'conv_in.bias' must have shape \(16,\), got \(3,\)",
        ),
        (
            lambda state: state.update({"odd": torch.zeros(3)}),
            "no use is known for tensor 'odd'",
        ),
    ],
)
def test_a_checkpoint_of_another_shape(damage, message, tmp_path) -> None:
    from safetensors.torch import save_file

    model = save("unet", tmp_path)
    state = model.state_dict()
    damage(state)
    with pytest.raises(ValueError, match=f"state: {message}"):
        UNet.from_diffusers(model.config, state)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)


def test_a_damaged_folder(tmp_path) -> None:
    save("unet", tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        UNet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="neither diffusion_pytorch_model.safetensors nor"):
        UNet.from_pretrained(tmp_path)
    shutil.copy(__file__, tmp_path / "config.json")
    with pytest.raises(ValueError, match="not JSON"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (UNet, dict(time_embedding_type="fourier"), "time_embedding_type must be 'positional'"),
        (UNet, dict(block_out_channels="wide"), "block_out_channels must be like"),
        (UNet, dict(norm_num_groups=None), "norm_num_groups must be like 32, got None"),
        (UNet, dict(layers_per_block=[2, -1, 1, 1]), "layers_per_block must be like 2"),
        (UNet, dict(layers=3), "no option 'layers' is known"),
        (UNet, dict(_class_name="UNet1DModel"), "_class_name must be one of"),
        (UNet, dict(act_fn="mish"), "act_fn must be 'silu', got 'mish'"),
        (UNet, dict(resnet_time_scale_shift="spatial"), "resnet_time_scale_shift must be"),
        (UNet, dict(down_block_types=["DownBlock2D"]), "down_block_types must have 4 values"),
        (UNet, dict(up_block_types=["SkipUpBlock2D"] * 4), "up_block_types must be among"),
        (DiT, dict(activation_fn="geglu"), "activation_fn must be 'gelu-approximate'"),
        (DiT, dict(patch_size=[1, 1, 2, 2]), "patch_size must be"),
    ],
)
def test_refuses_configurations(cls, config, message) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        cls(config)


# ---- calls ---------------------------------------------------------------------------------------

DIT = dict(attention_head_dim=8, num_attention_heads=2, num_layers=2, num_embeds_ada_norm=5)


def dit(**options):
    torch.manual_seed(0)
    model = DiT(DIT | options).double().eval()
    for parameter in model.parameters():  # many are zero at first
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_labels() -> None:
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([5, 700])
    model = dit()
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 5])))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([5, 4])))
    unet = UNet(UNET | dict(num_class_embeds=3)).double()
    with pytest.raises(ValueError, match="labels must be given"):
        unet(x[:, :3], t)
    with pytest.raises(ValueError, match="labels must be given"):
        UNet(UNET).double()(x[:, :3], t, torch.tensor([0, 1]))


def test_video() -> None:
    model = dit(patch_size=(2, 2, 4), in_channels=3, out_channels=5)
    x = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    out = model(x, torch.tensor([5, 700]))
    assert out.shape == (2, 5, 4, 6, 8)
    # Every frame has to do with every other.
    (grad,) = torch.autograd.grad(out[:, :, -1].square().sum(), x)
    assert (grad.abs().amax((0, 1, 3, 4)) > 0).all()
    # Frames are not interchangeable.
    assert not torch.allclose(model(x.flip(2), torch.tensor([5, 700])).flip(2), out)
    with pytest.raises(ValueError, match=r"sample must have sizes that \(2, 2, 4\) divides"):
        model(x[:, :, :3], torch.tensor([5, 700]))


def test_a_new_dit_is_the_identity_and_answers_zero() -> None:
    model = DiT(DIT).double()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([5, 700])
    assert not model(x, t).any()
    condition = model.transformer_blocks[0].norm1(torch.ones(2, 256).double(), torch.tensor([0, 5]))
    tokens = torch.randn(2, 16, 16, dtype=torch.float64)
    assert torch.equal(model.transformer_blocks[0](tokens, tokens, condition, condition)[0], tokens)


def test_patches_of_a_video_go_where_they_came_from() -> None:
    model = dit(patch_size=(1, 2, 3), in_channels=4)
    video, grid = torch.randn(2, 4, 3, 4, 6), (3, 2, 2)
    tokens = [
        video[:, :, f : f + 1, 2 * h : 2 * h + 2, 3 * w : 3 * w + 3].movedim(1, -1).flatten(1)
        for f, h, w in torch.cartesian_prod(*map(torch.arange, grid)).tolist()
    ]
    assert torch.equal(model._image(torch.stack(tokens, 1), grid), video)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_sampling(name) -> None:
    model, noise = ours_of(make(name)), image(4 if name == "dit" else 3)
    guided = dict(labels=torch.tensor([2, 7]), null_label=10, guidance_scale=2.0)
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    options = guided if name == "dit" else {}
    *_, (sample, x0) = sample_images(model, noise, scheduler, num_steps=3, **options)
    assert sample.shape == x0.shape == noise.shape and sample.isfinite().all()

"""StyleGAN2 against a plain PyTorch one of the same weights, to the second derivative."""

import re

import pytest
import torch

from aigc_fast.models.gan import StyleGAN2Discriminator, StyleGAN2Generator, load_stylegan2
from tests.models import plain_stylegan2 as plain

SMALL = {"channel_multiplier": 0.0156, "max_channels": 12}  # 12 to 8 channels up to 32 x 32


def generator(resolution=16, **options):
    torch.manual_seed(0)
    model = StyleGAN2Generator(resolution, 10, 2, **SMALL, **options)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "noise.weight")):  # zeros would hide a mistake
            p.data += 0.3 * torch.randn_like(p)
    return model.double()


def discriminator(resolution=16, **options):
    torch.manual_seed(1)
    model = StyleGAN2Discriminator(resolution, **SMALL, **options)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data += 0.3 * torch.randn_like(p)
    return model.double()


def latents(n=3, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 10, dtype=torch.float64, generator=g)


def weights_of(model):
    return dict(model.named_parameters())


def noises_of(model):
    return [getattr(model.noises, f"noise_{i}") for i in range(model.num_layers)]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def derivatives(model, function, x, penalty):
    """Output, gradients of x and all weights, and gradients of a penalty on the former."""
    x = x.clone().requires_grad_()
    y = function(x)
    (first,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x,
                                   create_graph=True)  # fmt: skip
    wanted = [x, *model.parameters()]
    second = torch.autograd.grad(penalty(first) + y.square().sum(), wanted, allow_unused=True)
    return [y, first, *(torch.zeros_like(p) if g is None else g
                        for g, p in zip(second, wanted, strict=True))]  # fmt: skip


@pytest.mark.parametrize("noise", ["constant", "none"])
def test_generator_is_the_plain_one_with_path_length_penalty(noise) -> None:
    model = generator()
    noises = noises_of(model) if noise == "constant" else [None] * model.num_layers
    weights = weights_of(model)

    def ours(styles):
        return model.synthesize(styles, noise)

    styles = plain.mapping(weights, latents()).detach()
    styles = styles.unsqueeze(1).repeat(1, model.num_styles, 1) + 0.1 * torch.randn(
        3, model.num_styles, 10, dtype=torch.float64
    )

    def path_length(gradient):
        return (gradient.square().sum(2).mean(1).sqrt() - 0.3).square().mean()

    a = derivatives(model, ours, styles, path_length)
    b = derivatives(model, lambda w: plain.generate(weights, w, noises), styles, path_length)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("batch", [4, 3, 1])
def test_discriminator_is_the_plain_one_with_r1_penalty(batch) -> None:
    model = discriminator()
    images = torch.randn(batch, 3, 16, 16, dtype=torch.float64)

    def r1(gradient):
        return gradient.square().sum((1, 2, 3)).mean()

    a = derivatives(model, model, images, r1)
    b = derivatives(model, lambda x: plain.discriminate(weights_of(model), x), images, r1)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


def test_style_mixing_truncation_and_average() -> None:
    model, z, second = generator(), latents(), latents(seed=5)
    weights = weights_of(model)
    w, other = plain.mapping(weights, z), plain.mapping(weights, second)
    model.update_average(w, decay=0.0)
    average = w.mean(0)
    styles = torch.stack([w, w, *[other] * (model.num_styles - 2)], 1)
    styles = average + 0.7 * (styles - average)
    got = model(z, mix=second, crossover=2, truncation=0.7, noise="constant")
    assert_same(got, plain.generate(weights, styles, noises_of(model)))
    drawn = model(z, mix=second, noise="none")
    assert drawn.shape == got.shape and not torch.equal(drawn, model(z, noise="none"))


def test_random_noise_is_drawn_for_each_image() -> None:
    model = generator()
    z = latents(1).expand(2, -1)
    torch.manual_seed(0)
    a = model(z)
    torch.manual_seed(0)
    assert torch.equal(a, model(z)) and not torch.allclose(a[0], a[1])


def test_noise_has_a_gradient() -> None:
    model, z = generator(8), latents(2)
    noises = [n.clone().requires_grad_() for n in noises_of(model)]
    got = torch.autograd.grad(model(z, noise=noises).square().sum(), noises)
    w = plain.mapping(weights_of(model), z).unsqueeze(1).expand(-1, model.num_styles, -1)
    want = plain.generate(weights_of(model), w, noises)
    for x, y in zip(got, torch.autograd.grad(want.square().sum(), noises), strict=True):
        assert_same(x, y)


def test_conditional_models_depend_on_the_label() -> None:
    g, d = generator(8, num_classes=3), discriminator(8, num_classes=3)
    z, labels = latents(), torch.tensor([0, 1, 2])
    images = g(z, labels, noise="none")
    assert not torch.allclose(images, g(z, labels.flip(0), noise="none"))
    assert d(images, labels).shape == (3, 1)
    assert not torch.allclose(d(images, labels), d(images, labels.flip(0)))
    for call in (lambda: g(z), lambda: g(z, labels[:2]), lambda: d(images, labels.double())):
        with pytest.raises(ValueError, match="labels must be 3 whole numbers"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype) -> None:
    g, d = generator(clamp=256.0), discriminator(clamp=256.0)
    z = latents(4)
    images = g(z, noise="constant")
    logits = d(images)
    g, d = g.to(dtype), d.to(dtype)
    low = g(z.to(dtype), noise="constant")
    assert low.dtype == dtype
    # 11 roundings in a row at most
    for got, exact in ((low, images), (d(images.to(dtype)), logits)):
        allowed = 11 * torch.finfo(dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() < allowed


def test_float16_does_not_overflow() -> None:
    """Styles and weights whose products pass 65504 leave no trace after demodulation."""
    from aigc_fast import ops

    x, w, s = torch.randn(2, 64, 8, 8), torch.randn(16, 64, 3, 3), torch.randn(2, 64) * 3e3
    want = ops.modulated_conv2d(x, w, s)
    got = ops.modulated_conv2d(x.half(), w, s)
    assert got.isfinite().all() and (got - want).abs().max() < 0.02


def test_autocast_and_channels_last() -> None:
    g, d = generator().float(), discriminator().float()
    z = latents(4).float()
    images = g(z, noise="constant")
    with torch.autocast("cpu", torch.bfloat16):
        low = g(z, noise="constant")
        logits = d(images.contiguous(memory_format=torch.channels_last))
    assert (low - images).abs().max() < 0.05 * images.abs().max()
    assert (logits - d(images)).abs().max() < 0.05
    g, d = (m.to(memory_format=torch.channels_last) for m in (g, d))
    last = g(z, noise="constant")
    torch.testing.assert_close(last, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d(last), d(images), rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break() -> None:
    layer = generator(8).convs[0].float()
    args = torch.randn(2, 12, 4, 4), latents(2).float(), torch.randn(1, 1, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), layer(*args))


def test_shapes_up_to_1024() -> None:
    with torch.device("meta"):
        g, d = StyleGAN2Generator(1024), StyleGAN2Discriminator(1024)
        assert g.num_styles == 18 and g.convs[-1].conv.weight.shape == (32, 32, 3, 3)
        assert d(g(torch.randn(2, 512))).shape == (2, 1)
    assert sum(p.numel() for p in g.parameters()) == 30_370_060  # the paper's 30M
    assert sum(p.numel() for p in d.parameters()) == 29_012_513


# ---- checkpoints ----------------------------------------------------------------------------


def rosinality_names(resolution):
    """The names in a checkpoint of rosinality/stylegan2-pytorch, size 16."""
    assert resolution == 16
    conv = ["conv.weight", "conv.modulation.weight", "conv.modulation.bias"]
    styled = [*conv, "noise.weight", "activate.bias"]
    names = [f"style.{i}.{p}" for i in (1, 2) for p in ("weight", "bias")] + ["input.input"]
    names += [f"{layer}.{p}" for layer in ("conv1", *(f"convs.{i}" for i in range(4)))
              for p in styled]  # fmt: skip
    names += [f"convs.{i}.conv.blur.kernel" for i in (0, 2)]
    names += [f"{layer}.{p}" for layer in ("to_rgb1", "to_rgbs.0", "to_rgbs.1")
              for p in (*conv, "bias")]  # fmt: skip
    names += [f"to_rgbs.{i}.upsample.kernel" for i in (0, 1)]
    return {*names, *(f"noises.noise_{i}" for i in range(5))}


def test_names_are_those_of_rosinality() -> None:
    assert set(generator().state_dict()) == rosinality_names(16) | {"latent_avg"}
    names = set(discriminator().state_dict())
    want = """convs.0.0.weight convs.0.1.bias convs.1.conv1.0.weight convs.1.conv1.1.bias
        convs.1.conv2.0.kernel convs.1.conv2.1.weight convs.1.conv2.2.bias convs.1.skip.0.kernel
        convs.1.skip.1.weight final_conv.0.weight final_conv.1.bias final_linear.0.weight
        final_linear.0.bias final_linear.1.weight final_linear.1.bias"""
    assert set(want.split()) | {n.replace("convs.1", "convs.2") for n in want.split()} == names
    kernel = generator().convs[0].conv.blur.kernel
    torch.testing.assert_close(kernel, 4 * plain.TAPS)


def nvlabs_names(model):
    """The model's weights under NVlabs' names and in their shapes."""
    found = {}
    for name, value in model.state_dict().items():
        if name.endswith("kernel"):
            continue
        if m := re.match(r"style\.(\d+)\.(\w+)", name):
            name = f"mapping.fc{int(m[1]) - 1}.{m[2]}"
        elif name == "latent_avg":
            name = "mapping.w_avg"
        elif name == "input.input":
            name, value = "synthesis.b4.const", value[0]
        elif m := re.match(r"noises\.noise_(\d+)", name):
            i = int(m[1])
            block = f"b{2 ** ((i + 5) // 2)}.conv{(i + 1) % 2}"
            name, value = f"synthesis.{block}.noise_const", value[0, 0]
        else:
            m = re.match(r"(conv1|to_rgb1|(?:convs|to_rgbs)\.(\d+))\.(.+)", name)
            i, rest = int(m[2] or -1), m[3]
            if "rgb" in m[1]:
                block = f"b{2 ** (i + 3)}.torgb"
                value = value.flatten() if rest == "bias" else value
            else:
                block = f"b{2 ** ((i + 6) // 2)}.conv{i % 2}"
            if rest == "noise.weight":
                value = value[0]
            rest = {"conv.weight": "weight", "activate.bias": "bias",
                    "noise.weight": "noise_strength"}.get(rest, rest)  # fmt: skip
            name = f"synthesis.{block}.{rest.replace('conv.modulation', 'affine')}"
        found[name] = value
    return {**found, "synthesis.b8.conv0.resample_filter": plain.TAPS.float()}


def test_loads_nvlabs_names() -> None:
    theirs = generator()
    weights = nvlabs_names(theirs)
    assert {"synthesis.b4.conv1.noise_const", "synthesis.b4.torgb.bias",
            "synthesis.b8.conv0.affine.bias", "synthesis.b16.conv1.noise_strength",
            "synthesis.b16.torgb.affine.weight"} <= set(weights)  # fmt: skip
    model = StyleGAN2Generator(16, 10, 2, **SMALL).double()
    load_stylegan2(model, weights)
    z = latents()
    assert torch.equal(model(z, noise="constant"), theirs(z, noise="constant"))


def test_loads_nvlabs_discriminator() -> None:
    theirs, renamed = discriminator(), {}
    patterns = {
        r"convs\.0\.[01]\.": "b16.fromrgb.",
        r"convs\.1\.conv1\.[01]\.": "b16.conv0.",
        r"convs\.1\.conv2\.[12]\.": "b16.conv1.",
        r"convs\.1\.skip\.1\.": "b16.skip.",
        r"convs\.2\.conv1\.[01]\.": "b8.conv0.",
        r"convs\.2\.conv2\.[12]\.": "b8.conv1.",
        r"convs\.2\.skip\.1\.": "b8.skip.",
        r"final_conv\.[01]\.": "b4.conv.",
        r"final_linear\.0\.": "b4.fc.",
        r"final_linear\.1\.": "b4.out.",
    }
    for name, value in theirs.named_parameters():
        for pattern, block in patterns.items():
            if re.match(pattern, name):
                renamed[re.sub(pattern, block, name)] = value.detach()
    model = StyleGAN2Discriminator(16, **SMALL).double()
    load_stylegan2(model, renamed)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(model(x), theirs(x))


def test_refuses_other_weights() -> None:
    model = generator()
    weights = model.state_dict()
    five = {k: v[None] if k.endswith("conv.weight") else v for k, v in weights.items()}
    load_stylegan2(model, {k: v for k, v in five.items() if "noises" not in k})
    with pytest.raises(ValueError, match=r"got also convs\.9\.weight"):
        load_stylegan2(model, {**weights, "convs.9.weight": torch.ones(1)})
    del weights["to_rgb1.bias"]
    with pytest.raises(ValueError, match=r"missing are to_rgb1\.bias"):
        load_stylegan2(model, weights)
    weights["to_rgb1.bias"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"must have shape \(1, 3, 1, 1\), got \(3,\)"):
        load_stylegan2(model, weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StyleGAN2Generator(24), "resolution must be a power of 2"),
        (lambda: generator()(torch.ones(2, 3).double()), r"z must have shape \(batch, 10\)"),
        (lambda: generator()(latents(), torch.ones(3)), "labels must be None"),
        (lambda: generator()(latents(), noise="white"), "noise must be random"),
        (lambda: generator()(latents(), noise=[]), "noise must be 5 tensors"),
        (lambda: generator().synthesize(torch.ones(2, 3, 10)), "styles must have shape"),
        (
            lambda: discriminator()(torch.ones(1, 3, 8, 8)),
            r"images must have shape \(batch, 3, 16",
        ),
    ],
)
def test_refuses(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_style_mixing_refuses():
    model, z = StyleGAN2Generator(8, 16, 2, max_channels=8), torch.randn(2, 16)
    for crossover in (-1, model.num_styles + 1):
        with pytest.raises(ValueError, match=f"crossover must be 0 to 4, got {crossover}"):
            model(z, mix=z, crossover=crossover)
    with pytest.raises(ValueError, match=r"mix must have the shape of z, got \(1, 16\)"):
        model(z, mix=z[:1])

"""Whole training steps of GANs: eager PyTorch, torch.compile where it can, and ours.

torch.compile has no double backward, so that it cannot do a step with a gradient penalty; where it
fails the result holds its error in place of a time.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aigc_fast._timing import interleaved
from aigc_fast.models.gan import (
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    MLPGenerator,
)
from aigc_fast.training import GANRecipe, GANTrainer
from benchmarks.machine import DEVICE


def plain(network: nn.Module) -> nn.Sequential:
    """The torch layers that the network's fused ones stand for, with its weights."""
    layers: list[nn.Module] = []
    for layer in network.main if hasattr(network, "main") else network:
        act = getattr(layer, "act", None)
        name = act if isinstance(act, str) else (act or {}).get("act")
        if isinstance(layer, nn.ConvTranspose2d):
            kind = nn.ConvTranspose2d
        elif isinstance(layer, nn.Conv2d):
            kind = nn.Conv2d
        elif isinstance(layer, nn.Linear):
            twin = nn.Linear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.BatchNorm2d):
            twin = nn.BatchNorm2d(layer.num_features)
        else:
            continue
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            twin = kind(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                layer.padding, bias=layer.bias is not None,
            )  # fmt: skip
        twin.load_state_dict(layer.state_dict())
        acts = {"lrelu": nn.LeakyReLU(0.2, True), "relu": nn.ReLU(True), "tanh": nn.Tanh()}
        layers += [twin, *([acts[name]] if name in acts else [])]
    return nn.Sequential(*layers)


class PlainTrainer:
    """The step as it is commonly written, in plain PyTorch."""

    def __init__(self, generator, discriminator, latent_shape, recipe: GANRecipe, compile=False):
        self.generator, self.discriminator, self.recipe = generator, discriminator, recipe
        self.latent_shape = latent_shape
        self.average = copy.deepcopy(generator)
        adam = lambda m: torch.optim.Adam(m.parameters(), 2e-4, recipe.betas)  # noqa: E731
        self.g_optimizer, self.d_optimizer = adam(generator), adam(discriminator)
        if compile:
            self.generator = torch.compile(generator)
            self.discriminator = torch.compile(discriminator)

    def step(self, real: torch.Tensor) -> None:
        wasserstein = self.recipe.loss == "wasserstein"
        judge, bce = self.discriminator, F.binary_cross_entropy_with_logits
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.recipe.bf16):
            fake = self.generator(torch.randn(len(real), *self.latent_shape, device=DEVICE))
            of_real, of_fake = judge(real).float(), judge(fake.detach()).float()
        fake = fake.float()
        if wasserstein:
            u = torch.rand(len(real), 1, 1, 1, device=DEVICE)
            between = (u * real + (1 - u) * fake.detach()).requires_grad_()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.recipe.bf16):
                logits = judge(between)
            (slope,) = torch.autograd.grad(logits.float().sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            d_loss = of_fake.mean() - of_real.mean() + 10 * penalty
        else:
            d_loss = bce(of_real, torch.ones_like(of_real))
            d_loss = d_loss + bce(of_fake, torch.zeros_like(of_fake))
        self.d_optimizer.zero_grad()
        d_loss.backward()
        self.d_optimizer.step()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.recipe.bf16):
            of_fake = judge(fake).float()
        g_loss = -of_fake.mean() if wasserstein else bce(of_fake, torch.ones_like(of_fake))
        self.g_optimizer.zero_grad()
        g_loss.backward()
        self.g_optimizer.step()
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
            for average, p in pairs:
                average.lerp_(p, 0.005)


def variants(generator, discriminator, latent_shape, recipe, real, quick) -> dict:
    """A step of each, of eager PyTorch in fp32 too where ours is in bf16; under "compile" why there
    is none, where it has none."""
    networks = lambda: [plain(n).to(DEVICE) for n in (generator, discriminator)]  # noqa: E731
    eager = PlainTrainer(*networks(), latent_shape, recipe)
    compiled = PlainTrainer(*networks(), latent_shape, recipe, compile=True)
    layout = {"memory_format": torch.channels_last} if recipe.bf16 else {}
    ours = GANTrainer(
        generator.to(DEVICE, **layout), discriminator.to(DEVICE, **layout),
        generator.latent_dim, recipe,
    )  # fmt: skip
    calls = {
        "eager": lambda: eager.step(real),
        "compile": lambda: compiled.step(real),
        "ours": lambda: ours.step(real),
    }
    if recipe.bf16:
        plain32 = PlainTrainer(*networks(), latent_shape, replace(recipe, bf16=False))
        calls["eager_fp32"] = lambda: plain32.step(real)
    if quick:  # compiling takes a minute
        return {**calls, "compile": "not with --quick"}
    try:
        # Reuse of buffers, which a second derivative forbids, would hide the error that matters.
        with torch._functorch.config.patch(donated_buffer=False):
            calls["compile"]()
    except RuntimeError as error:
        calls["compile"] = str(error).splitlines()[0]
    return calls


def measure(benchmark, calls: dict, quick: bool) -> None:
    failed = calls.pop("compile") if isinstance(calls["compile"], str) else None
    times = interleaved(calls, seconds=0.5 if quick else 10.0, rounds=1 if quick else 5)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        milliseconds={name: seconds * 1e3 for name, seconds in times.items()},
        eager_step_over_ours=times["eager"] / times["ours"],
        compile="n/a: " + failed if failed else times["compile"] / times["ours"],
    )
    if "eager_fp32" in times:
        benchmark.extra_info["eager_fp32_step_over_ours"] = times["eager_fp32"] / times["ours"]
    benchmark.pedantic(calls["ours"], rounds=2, warmup_rounds=0)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def bench_wgan_gp_dcgan_64(benchmark, quick, bf16) -> None:
    """Critic with its penalty, then generator, 32 images of 3 x 64 x 64."""
    torch.manual_seed(0)
    recipe = GANRecipe("wasserstein", "gradient", betas=(0.0, 0.9), bf16=bf16)
    generator, critic = DCGANGenerator(64), DCGANDiscriminator(64, norm=None)
    real = torch.rand(32, 3, 64, 64, device=DEVICE) * 2 - 1
    calls = variants(generator, critic, (100, 1, 1), recipe, real, quick)
    measure(benchmark, calls, quick)


def bench_mlp_gan(benchmark, quick) -> None:
    """Both networks of the MLP GAN, 64 digits."""
    torch.manual_seed(0)
    real = torch.rand(64, 784, device=DEVICE) * 2 - 1
    networks = MLPGenerator(), MLPDiscriminator()
    measure(benchmark, variants(*networks, (100,), GANRecipe(), real, quick), quick)
